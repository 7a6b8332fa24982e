"""Run ``laplace-lora`` in this process."""

from click.testing import CliRunner

from laplace_lora.commands.entry import main


def run(*args, given=None, status=0):
    """Run a command with arguments; return its result, whose status must be as expected."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], input=given)
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def refused(*args, given=None, status=1):
    """Run a command that must fail; return what it says, on one line, without a traceback."""
    result = run(*args, given=given, status=status)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())
