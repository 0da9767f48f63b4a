"""Asks a vLLM server for chat completions, and for what its draft came to: python ask.py URL PROMPT [PROMPT ...]"""

import json
import re
import sys
import time
from urllib.error import URLError
from urllib.request import Request, urlopen

DEADLINE_S = 300


def get(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=60) as reply:
        return reply.read().decode()


def wait_until_up(url: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            get(f"{url}/health")
            return
        except (URLError, ConnectionError):
            if time.monotonic() > deadline:
                sys.exit(f"{url} did not answer within {DEADLINE_S} s")
            time.sleep(1)


def counter(metrics: str, name: str) -> float:
    return sum(map(float, re.findall(rf"^vllm:spec_decode_{name}_total\{{.*\}} (\S+)$", metrics, flags=re.MULTILINE)))


def main(url: str, prompts: list[str]) -> None:
    wait_until_up(url)
    model = json.loads(get(f"{url}/v1/models"))["data"][0]["id"]
    for prompt in prompts:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 80}
        print(f"{prompt}\n{json.loads(get(f'{url}/v1/chat/completions', body))['choices'][0]['message']['content']}\n")
    metrics = get(f"{url}/metrics")
    drafts, accepted = counter(metrics, "num_drafts"), counter(metrics, "num_accepted_tokens")
    if drafts:
        print(f"acceptance length {1 + accepted / drafts:.2f} ({drafts:.0f} drafts)")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
