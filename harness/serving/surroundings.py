"""Settings that a model would start with here although no option says them: of a server that runs, or of the environment.

``harness check`` answers for what will run. A server that runs loads the model with its own settings; one that is started from
here takes the variables of this environment.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from harness.engines.registry import policy_of
from harness.errors import HarnessError
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.prediction.settings import AskedSettings


def environment_of(calibration: Calibration, machine: LocalMachine) -> Mapping[str, str]:
    """The variables that its engine has here: of a start, of a server that runs, else of this environment."""
    if machine.start_env is not None:
        return machine.start_env
    servers = [server for server in machine.running(calibration.engine) if server.readable]
    return servers[0].settings if servers else machine.environment


def as_set_here(calibration: Calibration, machine: LocalMachine) -> Calibration:
    """A calibration with the variables of a server here that its verdict is calculated with."""
    env, policy = environment_of(calibration, machine), policy_of(calibration.engine)
    settings = calibration.metadata.settings
    here = {name: env[name] for name in policy.verdict_variables if env.get(name)}
    served = machine.start_env is None and any(server.readable for server in machine.running(calibration.engine))
    kept = {name: value for name, value in settings.env.items() if not served or name not in policy.verdict_variables}
    settings = msgspec.structs.replace(settings, env={**kept, **here})
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, settings=settings))


def settings_here(
    calibration: Calibration, asked: AskedSettings, machine: LocalMachine
) -> tuple[AskedSettings, tuple[str, ...]]:
    """What is asked, completed by what is set here, and what is set here that no calculation covers, in words.

    Args:
        calibration: that would answer.
        asked: the settings of the question; they win.
        machine: this one.
    """
    policy, metadata = policy_of(calibration.engine), calibration.metadata
    own, on_gpu = metadata.settings, metadata.machine.target == "gpu"
    gpus = machine.gpus_of(metadata.machine.meter, own.env) if on_gpu else ()
    variables = policy.uncalculated(calibration, 0 if isinstance(gpus, HarnessError) else len(gpus))
    sources: list[tuple[str, Mapping[str, str]]] = [] if machine.start_env is None else [("this start", machine.start_env)]
    if machine.start_env is None:
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
            for name in variables
            if env.get(name) and env[name] != own.env.get(name) and not (asked.placed and name in policy.placing_variables)
        ]
        slots = env.get(policy.slots_variable, "")
        if slots.isdecimal() and int(slots) > (asked.num_parallel or 1):
            obstacles.append(f"{policy.slots_variable}={slots} of {where} (ask with --num-parallel {slots})")
    return asked, tuple(dict.fromkeys(obstacles))
