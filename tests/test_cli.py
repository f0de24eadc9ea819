"""The command line as a user runs it: in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.networks import tiny_classifier
from tests.test_job import write_photos

INFERMILL = str(Path(sys.executable).with_name("infermill"))


def infermill(*arguments: str | Path, cwd: Path, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(cwd), "COLUMNS": "120"}
    command = [INFERMILL, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=120, check=False
    )


def assert_problem(done: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    """One `error:` line, a hint, no traceback, nothing on standard output."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert re.match(r"error: .+\n(  .+\n)*\nhint: .+\n$", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def work(tmp_path: Path) -> Path:
    tiny_classifier(tmp_path / "tiny.onnx", classes=10, size=32)
    (tmp_path / "model.yaml").write_text(
        "name: tiny\nfiles: {onnx: tiny.onnx}\npreprocess: {resize: {exact: [32, 32]}}\noutput: {top_k: 3}\n"
    )
    write_photos(tmp_path / "photos", 12)
    return tmp_path


def test_run_prints_the_totals_and_the_output_last(work: Path) -> None:
    (work / "photos/bad\nname.jpg").write_bytes(b"no image")
    done = infermill("run", "photos", "-m", "model.yaml", "-o", "out", cwd=work)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("13 objects: 12 predicted, 1 failed in ")
    assert r"unsupported      1  bad\nname.jpg" in done.stdout
    assert "thread-seconds: list " in done.stdout
    assert lines[-1] == str(work / "out")
    assert "\x1b" not in done.stdout + done.stderr


def test_json_is_one_object_with_the_keys_of_the_summary(work: Path) -> None:
    done = infermill("run", "photos/", "-m", "model.yaml", "-o", "out/", "--limit", "10", "--json", cwd=work)
    summary = json.loads(done.stdout)
    assert list(summary) == [
        "planned", "ok", "failed", "failures_by_code", "example_keys", "seconds", "objects_per_second",
        "stage_seconds", "idle_seconds", "queue_depths", "verdict", "workers", "model_loads", "halved_batches",
        "runtime", "precision", "choice", "digest", "output", "new", "changed", "unchanged", "retried", "profile",
    ]  # fmt: skip
    assert list(summary["stage_seconds"]) == ["list", "fetch", "decode", "predict", "write", "idle"]
    assert (summary["planned"], summary["ok"], summary["runtime"], summary["precision"]) == (10, 10, "openvino", "fp32")
    assert list(summary["choice"]) == ["streams", "batch", "threads", "reason"]


def test_batch_and_threads_are_as_told(work: Path) -> None:
    flags = ["--batch", "3", "--threads", "1"]
    done = infermill("run", "photos", "-m", "model.yaml", "-o", "out", *flags, cwd=work)
    assert "batches of 3, 1 at once, 1 thread (as told (--batch))" in done.stdout
    success = json.loads((work / "out" / "_SUCCESS").read_bytes())
    assert success["choice"] == {"streams": 1, "batch": 3, "threads": 1, "reason": "as told (--batch)"}
    done = infermill("run", "photos", "-m", "model.yaml", "-o", "other", "--batch", "0", cwd=work)
    assert_problem(done, 2, "--batch 0 is less than 1")


def test_both_runtimes_and_a_bare_network_with_flags(work: Path) -> None:
    (work / "labels.txt").write_text("\n".join(f"label {i}" for i in range(10)))
    for runtime in ("openvino", "onnxruntime"):
        flags = ["--labels", "labels.txt", "--exact", "32", "32", "--mean", "0.5", "0.5", "0.5", "--top-k", "2"]
        done = infermill(
            "run", "photos", "-m", "tiny.onnx", "-o", f"out-{runtime}", "--runtime", runtime, *flags, "--json", cwd=work
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["runtime"] == runtime


def test_flags_that_change_what_is_predicted_reach_the_job(work: Path) -> None:
    Image.new("RGB", (48, 41)).save(work / "photos/larger.png")
    for name in ("a.JPG", "b.jpg", "c.gif"):
        Image.new("RGB", (48, 40)).save(work / "photos" / name)
    flags = ["--suffix", ".png", "--suffix", ".jpg", "--max-pixels", "1920", "--decode", "fast", "--json"]
    done = infermill("run", "photos", "-m", "model.yaml", "-o", "out", *flags, cwd=work)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["ok"], summary["failures_by_code"]) == (14, {"too_large": 1})
    job = json.loads((work / "out/_infermill/job.json").read_text())["fingerprint"]
    assert (job["suffix"], job["max_pixels"], job["decode"]) == ([".jpg", ".png"], 1920, "fast")


def test_a_manifest_on_standard_input(work: Path) -> None:
    keys = [f"photos/photo-{i:03d}.png" for i in range(3)]
    done = infermill("run", "-", "-m", "model.yaml", "-o", "out", "--json", cwd=work, stdin="\n".join(keys))
    assert json.loads(done.stdout)["ok"] == 3


def test_over_the_budget_is_exit_code_3(work: Path) -> None:
    (work / "photos/bad.jpg").touch()
    flags = ["run", "photos", "-m", "model.yaml", "-o", "out", "--max-failures"]
    done = infermill(*flags, "1%", cwd=work)
    assert done.returncode == 3
    assert "error: 1 of 13 objects fail, more than --max-failures 1%" in done.stderr
    assert infermill(*flags, "10%", cwd=work).returncode == 0
    done = infermill("plan", "photos", "-m", "model.yaml", "--max-failures", "0", cwd=work)
    assert done.returncode == 3
    assert "error: about 1 of 13 objects fail" in done.stderr


def test_a_job_that_the_budget_stops_prints_the_summary_so_far(work: Path) -> None:
    (work / "nothing.txt").write_text("nothing.png\n" * 300)
    flags = ["--partition-objects", "50", "--max-failures", "1", "--json"]
    done = infermill("run", "nothing.txt", "-m", "model.yaml", "-o", "out", *flags, cwd=work)
    assert done.returncode == 3
    assert re.search("^error: stopped: .* of the first .* objects fail", done.stderr, re.MULTILINE)
    summary = json.loads(done.stdout)
    assert 100 <= summary["failed"] < summary["planned"] == 300


def test_append_retry_status_and_verify(work: Path) -> None:
    flags = ["run", "photos", "-m", "model.yaml", "-o", "out", "--partition-objects", "6"]
    (work / "photos/later.png").symlink_to(work / "later.png")
    assert infermill(*flags, cwd=work).returncode == 0
    write_photos(work / "photos", 1, first=99)
    done = infermill(*flags, "--append", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "listed again: 1 new, 0 changed, 13 unchanged\n" in done.stdout
    done = infermill("status", "out", cwd=work)
    assert done.stdout.startswith(
        "14 objects: 13 predicted, 1 failed, 0 left\n4 partitions: 4 done, 0 left\nfinished\n"
    )
    assert "missing      1  later.png\n" in done.stdout
    assert re.search(r"^ +0 +6 +5 +1$", done.stdout, re.MULTILINE)
    (work / "later.png").write_bytes((work / "photos/photo-001.png").read_bytes())
    (work / "elsewhere").mkdir()
    done = infermill("retry", "../out", cwd=work / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert "1 predicted again\n" in done.stdout
    assert json.loads(infermill("retry", "out", "--codes", "empty,corrupt", "--json", cwd=work).stdout)["retried"] == 0
    done = infermill("verify", "out", cwd=work)
    assert (done.returncode, done.stdout) == (
        0,
        "verified: 14 objects in 4 partitions, 14 predicted and 0 failed\n",
    )
    (work / "out/part-00001.parquet").rename(work / "out/mine.parquet")
    (work / "out/_SUCCESS").unlink()
    done = infermill("verify", "out", cwd=work)
    assert done.returncode == 1
    assert done.stdout == (
        "problem: part-00001.parquet is missing\n"
        "problem: mine.parquet is no part of this job, and its rows are read with the others\n"
        "problem: there is no _SUCCESS: the job is not finished\n"
        "\n"
        "`infermill run` with the same arguments does what is missing: delete a part that is damaged\n"
    )
    assert json.loads(infermill("verify", "out", "--json", cwd=work).stdout)["problem_count"] == 3
    status = json.loads(infermill("status", "out", "--json", cwd=work).stdout)
    assert (status["left"], status["success"]) == (6, False)
    assert status["by_partition"][1] == {"partition": 1, "planned": 6, "ok": None, "failed": None}
    assert "not finished: 6 objects are left" in infermill("status", "out", cwd=work).stdout


def test_overwrite_says_where_the_old_job_lies(work: Path) -> None:
    flags = ["run", "photos", "-m", "model.yaml", "-o", "out"]
    infermill(*flags, cwd=work)
    done = infermill(*flags, "--limit", "3", cwd=work)
    assert_problem(done, 2, "limit: None -> 3", "--overwrite")
    done = infermill(*flags, "--limit", "3", "--overwrite", cwd=work)
    assert done.stdout.startswith("3 objects: 3 predicted")
    (told,) = re.findall(r"^the old job lies in (.+)$", done.stderr, re.MULTILINE)
    assert infermill("verify", told, cwd=work).stdout.startswith("verified: 12 objects")


def test_plan_writes_nothing(work: Path) -> None:
    before = sorted(work.rglob("*"))
    done = infermill("plan", "photos", "-m", "model.yaml", cwd=work)
    assert done.returncode == 0, done.stderr
    for line in ("objects     12", "partitions  1", "failures    none expected"):
        assert line in done.stdout
    as_json = json.loads(infermill("plan", "photos", "-m", "model.yaml", "--json", cwd=work).stdout)
    assert (as_json["objects"], as_json["probed"]) == (12, 12)
    assert sorted(work.rglob("*")) == before


def test_inspect_writes_a_card_that_runs(work: Path) -> None:
    done = infermill("inspect", "tiny.onnx", "--write", "guessed.yaml", cwd=work)
    assert done.returncode == 0, done.stderr
    assert re.search(r"input +\S+ +float32 +\[.*32.*\]", done.stdout)
    assert "assumed: " in done.stdout
    assert "computed in fp32" in done.stdout
    assert "computed in bf16" in infermill("inspect", "tiny.onnx", "--precision", "bf16", cwd=work).stdout
    done = infermill("run", "photos", "-m", "guessed.yaml", "-o", "out", "--json", cwd=work)
    assert json.loads(done.stdout)["ok"] == 12
    assert_problem(infermill("inspect", "tiny.onnx", "--write", "guessed.yaml", cwd=work), 2, "is there already")


def test_doctor_has_a_hint_for_everything_that_is_missing(work: Path) -> None:
    done = infermill("doctor", cwd=work)
    assert done.returncode == 0, done.stdout
    for name in ("openvino", "onnxruntime", "Pillow", "obstore", "S3 credentials"):
        assert name in done.stdout
    missing = [one for one in json.loads(infermill("doctor", "--json", cwd=work).stdout) if not one["usable"]]
    assert missing
    assert all(one["hint"] for one in missing)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "nowhere", "-m", "model.yaml", "-o", "out"], 1, ["nowhere does not exist"]),
        (["run", "empty", "-m", "model.yaml", "-o", "out"], 1, ["holds no objects"]),
        (["run", "photos", "-m", "missing.yaml", "-o", "out"], 2, ["missing.yaml does not exist"]),
        (["run", "photos", "-m", "typo.yaml", "-o", "out"], 2, ["unknown field `preproces`", "`preprocess`"]),
        (["run", "photos", "-m", "corrupt.onnx", "-o", "out"], 2, ["corrupt.onnx"]),
        (["run", "photos", "-m", "photos", "-o", "out"], 2, ["neither a model card nor a network"]),
        (["run", "ftp://host/x", "-m", "model.yaml", "-o", "out"], 2, ["cannot read ftp://"]),
        (["run", "photos", "-m", "model.yaml", "-o", "out", "--limt", "3"], 2, ["--limit"]),
        (["run", "photos", "-m", "model.yaml"], 2, ["--output"]),
        (["run", "photos", "-m", "model.yaml", "-o", "out", "--limit", "x"], 2, ["--limit"]),
        (["run", "photos", "-m", "model.yaml", "-o", "out", "--limit", "0"], 2, ["limit"]),
        (["run", "photos", "-m", "model.yaml", "-o", "out", "--max-failures", "lots"], 2, ["--max-failures lots"]),
        (["run", "photos", "-m", "model.yaml", "-o", "model.yaml/out"], 1, ["model.yaml/out"]),
        (["run", "photos", "-m", "model.yaml", "-o", "out", "--append", "--overwrite"], 2, ["--append, --overwrite"]),
        (["run", "photos", "-m", "model.yaml", "-o", "out", "--append", "--limit", "3"], 2, ["--limit and --append"]),
        (["retry", "photos"], 2, ["photos holds no job"]),
        (["retry", "photos", "--codes", "missing,lost"], 2, ["no failure is called lost"]),
        (["status", "photos"], 2, ["photos holds no job"]),
        (["verify", "nowhere"], 2, ["nowhere holds no job"]),
        (["plan", "nowhere", "-m", "model.yaml"], 1, ["nowhere does not exist"]),
        (["inspect", "missing.onnx"], 2, ["missing.onnx does not exist"]),
        (["run", "nowhere", "-m", "model.yaml", "-o", "out", "--precision", "int8"], 2, ["--precision"]),
        (
            ["run", "nowhere", "-m", "model.yaml", "-o", "out", "--precision", "bf16", "--runtime", "onnxruntime"],
            2,
            ["onnxruntime has no bf16"],
        ),
        (["run", "s3://x/", "-m", "model.yaml", "-o", "out", "--aws-profile", "nobodys"], 1, ["(nobodys)"]),
        (["classify"], 2, ["classify"]),
    ],
)
def test_a_mistake_is_one_line_and_a_hint(work: Path, arguments: list[str], code: int, words: list[str]) -> None:
    (work / "empty").mkdir()
    (work / "typo.yaml").write_text("name: x\nfiles: {onnx: tiny.onnx}\npreproces: {}\n")
    (work / "corrupt.onnx").write_bytes(b"this is no protobuf" * 100)
    assert_problem(infermill(*arguments, cwd=work), code, *words)


def test_help_needs_none_of_the_heavy_libraries(work: Path) -> None:
    script = "import sys; sys.argv = ['infermill', '--help']\nfrom infermill.__main__ import main\ntry: main()\n"
    script += "finally: print([m for m in ('numpy','pyarrow','pydantic','onnx','openvino') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=work, check=True)
    assert done.stdout.endswith("[]\n")
    for command in ("run", "retry", "status", "verify", "plan", "inspect", "convert", "check", "doctor", "demo"):
        assert re.search(rf"^\S* *{command} ", done.stdout, re.MULTILINE)


def test_ctrl_c_stops_soon_keeps_finished_parts_and_says_how_to_resume(work: Path) -> None:
    write_photos(work / "many", 200)
    manifest = [f"many/photo-{i % 200:03d}.png" for i in range(100_000)]
    (work / "many.txt").write_text("\n".join(manifest))
    command = [INFERMILL, "run", "many.txt", "-m", "model.yaml", "-o", "out", "--partition-objects", "100"]
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((work / "out").glob("part-*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stopped = time.monotonic()
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - stopped < 2
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert "`infermill run` with the same arguments resumes" in stderr
    assert list((work / "out").glob("part-*.parquet"))
    assert not (work / "out/_SUCCESS").exists()


JOB = ["-m", "model.yaml", "--anonymous"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "s3://bucket/photos/", *JOB, "-o", "out"], "`infermill run` with the same arguments resumes"),
        (
            ["run", "s3://bucket/photos/", *JOB, "-o", "out", "--overwrite"],
            "`infermill run` without --overwrite, and otherwise with the same arguments resumes",
        ),
        (["retry", "s3://bucket/out", *JOB], "`infermill retry` with the same arguments resumes"),
        (["plan", "s3://bucket/photos/", *JOB], "the same command starts anew"),
        (
            ["datasets", "cifar10", "--to", "cifar", "--url", "ENDPOINT/cifar.tar.gz"],
            "the same command writes what is missing",
        ),
    ],
    ids=lambda value: "-".join(value[:1]) if isinstance(value, list) else "",
)
def test_ctrl_c_stops_soon_even_while_a_store_does_not_answer(work: Path, arguments: list[str], hint: str) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        arguments = [one.replace("ENDPOINT", endpoint) for one in (*arguments, "--endpoint-url", "ENDPOINT")]
        command = [INFERMILL, *arguments]
        process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        silent.settimeout(60)
        connection, _ = silent.accept()
        process.send_signal(signal.SIGINT)
        stopped = time.monotonic()
        _, stderr = process.communicate(timeout=30)
        connection.close()
    assert time.monotonic() - stopped < 2
    assert process.returncode == 130
    assert re.fullmatch(rf"(downloading .*\n)?error: stopped\n\nhint: (.*: )?{re.escape(hint)}\n", stderr)


def test_what_a_bare_network_is_taken_for_is_said(work: Path) -> None:
    done = infermill("run", "photos", "-m", "tiny.onnx", "-o", "out", cwd=work)
    assert done.returncode == 0, done.stderr
    assert "assumed: " in done.stderr
