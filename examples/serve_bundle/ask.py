"""Asks a vLLM server for chat completions, and for what its draft came to.

python ask.py --pid PID URL PROMPT [PROMPT ...]    waits until the server, a process of that id, is up
python ask.py --free URL                           fails if somebody answers there already
"""

import argparse
import json
import os
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


def is_up(url: str) -> bool:
    try:
        get(f"{url}/health")
    except (URLError, OSError):
        return False
    return True


def wait_until_up(url: str, pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_up(url):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            sys.exit("the server ended before it was up")
        if time.monotonic() > deadline:
            sys.exit(f"{url} did not answer within {DEADLINE_S} s")
        time.sleep(1)


def counter(metrics: str, name: str) -> float:
    return sum(map(float, re.findall(rf"^vllm:spec_decode_{name}_total\{{.*\}} (\S+)$", metrics, flags=re.MULTILINE)))


def ask(url: str, prompts: list[str]) -> None:
    model = json.loads(get(f"{url}/v1/models"))["data"][0]["id"]
    for prompt in prompts:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 200}
        print(f"{prompt}\n{json.loads(get(f'{url}/v1/chat/completions', body))['choices'][0]['message']['content']}\n")
    metrics = get(f"{url}/metrics")
    drafts, accepted = counter(metrics, "num_drafts"), counter(metrics, "num_accepted_tokens")
    if drafts:
        print(f"acceptance length {1 + accepted / drafts:.2f} ({drafts:.0f} drafts)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pid", type=int)
    parser.add_argument("--free", action="store_true")
    parser.add_argument("url")
    parser.add_argument("prompts", nargs="*")
    args = parser.parse_args()
    if args.free:
        sys.exit(f"{args.url}: somebody answers there already; choose another port" if is_up(args.url) else 0)
    wait_until_up(args.url, args.pid)
    ask(args.url, args.prompts)
