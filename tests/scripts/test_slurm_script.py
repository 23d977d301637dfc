"""scripts/slurm_pretrain.sh against a pretended SLURM: an ``srun`` and a ``scontrol`` that write down what they get."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from processes import meeting_point

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm_pretrain.sh"

SRUN = """#!/bin/bash
printf '%s\\0' "$@" > "$RECORD/srun"
printf '%s:%s:%s' "$MASTER_ADDR" "$MASTER_PORT" "$SRUN_CPUS_PER_TASK" > "$RECORD/environment"
trap > "$RECORD/ignored"
touch "$RECORD/started"
while [ -e "$RECORD/hold" ]; do sleep 0.02; done
exit "$SRUN_CODE"
"""

SCONTROL = """#!/bin/bash
printf '%s\\n' "$*" >> "$RECORD/scontrol"
if [ "$1" = show ]; then printf 'gpu-07\\ngpu-08\\n'; else exit "${SCONTROL_CODE:-0}"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """A folder to submit from, and a function that runs the script there and returns (process, records)."""
    for name, text in (("bin/srun", SRUN), ("bin/scontrol", SCONTROL), ("work/main_pretrain.py", "")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    record = tmp_path / "record"
    record.mkdir()
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RECORD": str(record),
        "PYTHON": "python3",
        "SLURM_SUBMIT_DIR": str(tmp_path / "work"),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "gpu-[07-08]",
        "SLURM_CPUS_PER_TASK": "12",
    }

    def submit(*arguments, code=0, **variables):
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env=environment | {"SRUN_CODE": str(code)} | variables,
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    submit.record = record
    return submit


def requeues(record: Path) -> list[str]:
    return [line for line in (record / "scontrol").read_text().splitlines() if line.startswith("requeue")]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_a_run_that_ended_keeps_its_exit_code_and_is_not_requeued(slurm, code):
    process = slurm("--method", "dino", code=code)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert requeues(slurm.record) == []


def test_a_run_that_saved_itself_is_requeued(slurm):
    process = slurm("--method", "dino", code=75)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert requeues(slurm.record) == ["requeue 1234567"]


def test_a_refused_requeue_says_how_to_continue(slurm):
    process = slurm(code=75, SCONTROL_CODE="1")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "1234567" in errors and "same command" in errors


def test_arguments_reach_python_as_they_stand(slurm):
    arguments = ["--data_path", "a folder/with $(touch bad) `spaces`; *", "--output_dir", ""]
    slurm(*arguments).communicate(timeout=30)
    given = (slurm.record / "srun").read_text().split("\0")[:-1]
    assert given[given.index("python3") :] == ["python3", "main_pretrain.py", *arguments]


def test_every_task_learns_the_address_of_the_first_node(slurm):
    slurm().communicate(timeout=30)
    job = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "gpu-[07-08]"}
    host, port, _ = meeting_point(job)  # where tasks would meet without the script
    assert (slurm.record / "environment").read_text() == f"{host}:{port}:12" == f"gpu-07:{20000 + 1234567 % 20000}:12"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_script_outlives_a_signal_and_acts_on_the_code_of_its_tasks(slurm, number):
    (slurm.record / "hold").touch()
    process = slurm(code=75)
    wait_for(slurm.record / "started")
    process.send_signal(number)
    time.sleep(0.1)
    assert process.poll() is None
    (slurm.record / "hold").unlink()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert requeues(slurm.record) == ["requeue 1234567"]
    ignored = (slurm.record / "ignored").read_text()  # a shell may have started these tests without SIGINT
    assert "TERM" not in ignored and "USR1" not in ignored, "the tasks must not inherit an ignored signal"


def test_the_warning_goes_to_the_tasks_and_the_job_may_be_requeued():
    directives = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=USR1@180" in directives  # "B:USR1" would reach the shell alone
    assert "#SBATCH --requeue" in directives
    assert "#SBATCH --ntasks-per-node=8" in directives


def test_submitting_from_elsewhere_is_explained(slurm, tmp_path):
    process = slurm(SLURM_SUBMIT_DIR=str(tmp_path))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "submit from the repository's root" in errors
    assert not (slurm.record / "srun").exists()
