"""Settings that a model would start with here although no option says them: of a server that runs, or of the environment.

``harness check`` answers for what will run. A server that runs loads the model with its own settings; one that is started from
here takes the variables of this environment.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from harness.engines.registry import policy_of
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.prediction.settings import AskedSettings


def environment_of(calibration: Calibration, machine: LocalMachine) -> Mapping[str, str]:
    """The variables that its engine has here: of a server that runs, else of this environment."""
    servers = [server for server in machine.running(calibration.engine) if server.readable]
    return servers[0].settings if servers else machine.environment


def settings_here(
    calibration: Calibration, asked: AskedSettings, machine: LocalMachine
) -> tuple[AskedSettings, tuple[str, ...]]:
    """What is asked, completed by what is set here, and what is set here that no calculation covers, in words.

    Args:
        calibration: that would answer.
        asked: the settings of the question; they win.
        machine: this one.
    """
    policy, own = policy_of(calibration.engine), calibration.metadata.settings
    servers = [server for server in machine.running(calibration.engine) if server.readable]
    sources = [(f"the {policy.title} that runs here (port {one.port})", one.settings) for one in servers]
    obstacles = []
    for where, env in sources or [("this environment", machine.environment)]:
        said = policy.settings_by(env)
        for field in AskedSettings.__struct_fields__:
            if getattr(asked, field) is None and getattr(said, field) is not None:
                asked = msgspec.structs.replace(asked, **{field: getattr(said, field)})
        obstacles += [
            f"{name}={env[name]} of {where}"
            for name in policy.memory_variables
            if env.get(name) and env[name] != own.env.get(name) and not (asked.placed and name in policy.placing_variables)
        ]
        slots = env.get(policy.slots_variable, "")
        if slots.isdecimal() and int(slots) > (asked.num_parallel or 1):
            obstacles.append(f"{policy.slots_variable}={slots} of {where} (ask with --num-parallel {slots})")
    return asked, tuple(dict.fromkeys(obstacles))
