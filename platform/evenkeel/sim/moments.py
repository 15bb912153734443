"""The moments of the controller at which faults may strike."""

from evenkeel.control import messages as m


def moments(event: m.Event, commands: tuple[m.Command, ...]) -> list[str]:
    """What of note the controller has just heard or said."""
    found = {
        "shown": any(isinstance(c, m.Metrics) for c in commands),
        "saving": any(isinstance(c, m.Log) and c.event == "checkpoint_started" for c in commands),
        "part written": isinstance(event, m.PartWritten),
        "manifest written": isinstance(event, m.CheckpointCommitted),
        "loading": any(isinstance(c, m.Form) and c.world.saved for c in commands),
        "looking": any(isinstance(c, m.LookAt) for c in commands),
        "looked": isinstance(event, m.Looked),
    }
    return [moment for moment, happens in found.items() if happens]
