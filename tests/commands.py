"""Commands as a user types them, run in this process."""

from click.testing import CliRunner, Result

from vpruner.cli import main


def call(*arguments, code: int = 0, **options) -> Result:
    """Run a command; a traceback of ours fails the test, whatever the exit code."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "stopped on an error of its own" not in result.stderr, result.stderr
    assert result.exit_code == code, result.output
    return result


def fails(*arguments, says: str, code: int = 2) -> None:
    """A user's mistake: the exit code, exactly one line of error, and no traceback."""
    result = call(*arguments, code=code)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert len(errors) == 1, result.stderr
    assert says in errors[0], errors[0]
    assert "Traceback" not in result.stderr and result.stdout == ""
