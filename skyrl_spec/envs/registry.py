"""Environments by name: skyrl-gym's registry plus the user's own.

skyrl_gym is imported inside the functions, because it imports pandas, which would make ``--help`` a second slower.
"""

from __future__ import annotations

import importlib

from skyrl_spec.errors import ConfigError


def register_custom(custom: dict[str, str]) -> None:
    """Adds ``environment.custom`` (env_class to ``"module:Class"``) to the registry of this process. May be repeated.

    Raises:
        ConfigError: a name that is taken, or an entry that is not ``module:Class``, cannot be imported or is not a
            ``BaseTextEnv``.
    """
    import skyrl_gym

    for env_class, entry_point in custom.items():
        where = f"environment.custom.{env_class}={entry_point}"
        _check_entry_point(entry_point, where)
        if env_class not in skyrl_gym.registry:
            skyrl_gym.register(env_class, entry_point)
        elif skyrl_gym.registry[env_class].entry_point != entry_point:
            raise ConfigError(f"{where}: the name is taken ({', '.join(sorted(skyrl_gym.registry))}); choose another")


def check_env_class(env_class: str, custom: dict[str, str], *, setting: str = "environment.env_class") -> None:
    """Raises ConfigError, with a list of the valid names, unless ``env_class`` is one of skyrl-gym's or ``custom``."""
    import skyrl_gym

    known = sorted({*skyrl_gym.registry, *custom})
    if env_class not in known:
        raise ConfigError(
            f"{setting}={env_class}: must be one of {', '.join(known)}; add your own with "
            f"environment.custom.NAME=module:Class"
        )


def _check_entry_point(entry_point: str, where: str) -> None:
    from skyrl_gym.envs.base_text_env import BaseTextEnv

    module_name, _, class_name = entry_point.partition(":")
    if not module_name or not class_name:
        raise ConfigError(f"{where}: must be module:Class, as in my_package.envs:MyEnv")
    try:
        env_type = vars(importlib.import_module(module_name)).get(class_name)
    except ImportError as error:
        raise ConfigError(f"{where}: cannot be imported ({error}); install it or extend PYTHONPATH") from error
    if not (isinstance(env_type, type) and issubclass(env_type, BaseTextEnv)):
        raise ConfigError(f"{where}: must name a subclass of skyrl_gym's BaseTextEnv in {module_name}; correct it")
