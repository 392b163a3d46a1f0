"""The paths of a job file: variables, the home folder, and what no path can be."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from sft_job import paths
from sft_job.config import load, read_stored, stored
from sft_job.errors import ConfigError
from sft_job.rundir import RunDir

CONTAINER = "type: apptainer, image: $ROOT/x.sif, bind: [$ROOT/b], python: $ROOT/bin/python"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$ROOT, with data and a model in it; also the home folder."""
    folder = tmp_path / "root"
    (folder / "llama").mkdir(parents=True)
    for name in ("a.json", "b.json"):
        (folder / name).write_text("[]")
    monkeypatch.setenv("ROOT", str(folder))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    return folder


def faults(job_file: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(job_file, overrides)
    return [fault.replace(f"{job_file.parent}/", "") for fault in caught.value.faults]


def test_variables_and_the_home_folder_are_expanded_in_every_path(job_file, root):
    """In the file and in overrides, in patterns and in lists."""
    job_file.write_text(
        "model: {path: $ROOT/llama}\n"
        "data: {train: [$ROOT/a.json, ~/b.json, '${ROOT}/*.json'], cache_dir: $ROOT/cache}\n"
        "run: {dir: '${ROOT}/run'}\n"
        f"container: {{{CONTAINER}}}\n"
    )
    config = load(job_file)
    assert config.model.path == str(root / "llama")
    assert config.data.train == [str(root / name) for name in ("a.json", "b.json", "*.json")]
    assert config.data.cache_dir == str(root / "cache")
    assert config.run.dir == str(root / "run")
    assert config.container.image == str(root / "x.sif")
    assert config.container.bind == [str(root / "b")]
    assert config.container.python == str(root / "bin/python")
    again = load(job_file, ["run.dir=$ROOT/x", "data.train=[~/a.json]", "model.path=~/llama"])
    assert again.run.dir == str(root / "x")
    assert again.data.train == [str(root / "a.json")]
    assert again.model.path == str(root / "llama")


def test_every_key_that_is_a_path_is_expanded(job_file):
    """A new key that takes a path must be added to the list."""
    words = ("dir", "path", "image", "bind", "train", "python")
    from sft_job.config import known_keys

    named = {key for key in known_keys() if key.rpartition(".")[2].endswith(words)}
    assert named - {"train"} == set(paths.PATHS)


def test_a_registry_address_and_a_hub_id_may_hold_variables(job_file, monkeypatch):
    """Expanded, and still no paths."""
    monkeypatch.setenv("TAG", "v1")
    config = load(job_file, ["model.path=org/$TAG", "container={type: pyxis, image: 'r#x:$TAG'}"])
    assert config.model.path == "org/v1"
    assert config.container.image == "r#x:v1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("$UNSET/run", "the variable UNSET is not set; set it, or write $$ for a dollar"),
        ("${UNSET}", "the variable UNSET is not set"),
        ("$EMPTY/run", "the variable EMPTY is empty"),
        ("a/$ROOT$UNSET", "the variable UNSET is not set"),
        ("${UNSET:-/tmp}", "'${UNSET:-/tmp}' is no variable; write $NAME or ${NAME}, and $$"),
        ("$(pwd)", "'$(pwd)' is no variable"),
        ("cost$", "'$' is no variable"),
        ("$1", "'$1' is no variable"),
        ("${ROOT", "'${ROOT' is no variable"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name: there is no such user; ./~nobody-of"),
    ],
)
def test_what_no_shell_would_expand_is_refused(job_file, root, text, said):
    """With the key, the line and the name; nothing is made in a folder named `$UNSET`."""
    (found,) = faults(job_file, f"run.dir='{text}'")
    assert found.startswith(f"override run.dir: {said}")
    job_file.write_text(job_file.read_text().replace("{dir: run}", f"{{dir: '{text}'}}"))
    (found,) = faults(job_file)
    assert found.startswith(f"job.yaml:3: run.dir: {said}")


def test_an_unset_variable_among_several_paths_has_its_own_line(job_file, root):
    job_file.write_text(
        "model: {path: 'bundled:smollm2-135m'}\n"
        "data:\n  train:\n  - $ROOT/a.json\n  - $UNSET/b.json\nrun: {dir: run}\n"
    )
    assert faults(job_file) == [
        "job.yaml:5: data.train: the variable UNSET is not set; set it, or write $$ for a dollar"
    ]


def test_an_override_makes_the_variables_of_the_file_needless(job_file, root):
    """A recipe written for another site, with run.dir given by hand."""
    job_file.write_text(job_file.read_text().replace("{dir: run}", "{dir: $UNSET/run}"))
    assert load(job_file, ["run.dir=/x/y"]).run.dir == "/x/y"


@pytest.mark.parametrize("key", ["data.cache_dir", "run.dir", "model.path", "data.train"])
def test_a_tilde_alone_may_mean_two_things_in_a_path(job_file, key):
    """Null to YAML, the home folder to a shell; with a slash, or in quotes, it is the folder."""
    (found,) = faults(job_file, f"{key}=~")
    assert found == (
        f"override {key}: ~ alone is null to YAML; write ~/ for the home folder, or null"
    )
    assert load(job_file, ["train.max_steps=~", "slurm=~", "train.extra={tf32: ~}"])


def test_the_home_folder_with_a_slash(job_file, root):
    assert load(job_file, ["data.cache_dir=~/"]).data.cache_dir == str(root)
    assert load(job_file, ["data.cache_dir='~'"]).data.cache_dir == str(root)


def test_the_home_folder_must_be_known(job_file, monkeypatch):
    monkeypatch.setenv("HOME", "")
    assert faults(job_file, "run.dir=~/x") == ["override run.dir: ~ is not known: HOME is empty"]


def test_without_home_the_password_file_is_asked(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    home = pwd.getpwuid(os.getuid()).pw_dir
    assert paths.substitute("~/x", {}) == f"{home.rstrip('/')}/x"


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes somebody without a name")
def test_a_user_without_a_name_is_told_to_set_home(tmp_path):
    """As in a container that is run with --user 12345; the hub's cache is then nowhere."""
    code = (
        "import os; from sft_job import paths, prepared; os.setuid(54321)\n"
        "try: paths.substitute('~/x', {})\n"
        "except ValueError as error: print(error)\n"
        "print(prepared.hub_folder('org/name'))"
    )
    environ = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environ, capture_output=True, text=True)
    told, folder = result.stdout.splitlines()
    assert told.startswith("~ is not known: HOME is not set, and this user has no entry in the p")
    assert folder == "~/.cache/huggingface/hub/models--org--name"


@pytest.mark.parametrize("name", ["$HOME", "a$$b", "~", "$", "${x}", "\u2028x", "\x85", "x\n\ty"])
def test_what_is_stored_is_the_same_path_in_any_environment(job_file, name, monkeypatch):
    """job.json is a job file again, and names the folders that were meant when it was made."""
    folder = job_file.parent / "x" / name
    config = load(job_file)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})
    again = job_file.with_name("job.json")
    again.write_text(stored(config), encoding="utf-8")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert load(again) == config
    assert read_stored(again.read_text(encoding="utf-8")) == config


def test_a_run_directory_with_a_dollar_in_its_name_is_resumed(job_file, root):
    """What claims it and what looks whose it is read and write alike."""
    config = load(job_file, ["run.dir=$ROOT/cost$$5", "data.train=$ROOT/a.json"])
    assert config.run.dir == str(root / "cost$5")
    run = RunDir(config.run.dir)
    run.claim(config, "text")
    assert load(run.job_file) == config
    run.claim(load(run.job_file), "text")  # by the same job
    assert [path.name for path in root.iterdir() if "cost" in path.name] == ["cost$5"]


def test_what_is_no_stored_job_is_said_to_be_none():
    for text in ("", "3", "[]", "{}", "[" * 100_000, "\x00"):
        with pytest.raises(ValueError):  # noqa: PT011
            read_stored(text)


def test_brackets_of_the_job_files_folder_are_no_pattern(tmp_path):
    """`*.json` beside a job file in `runs[1]/` means the files there."""
    folder = tmp_path / "runs[1]"
    folder.mkdir()
    (folder / "a.json").write_text("[]")
    job = folder / "job.yaml"
    job.write_text(
        "model: {path: 'bundled:smollm2-135m'}\ndata: {train: ['*.json']}\nrun: {dir: run}\n"
    )
    assert load(job).data.files() == [folder / "a.json"]


# --- what no path can be -------------------------------------------------------------------


@pytest.mark.parametrize("key", ["run.dir", "data.cache_dir"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("conversations.json", "conversations.json is a file, not a folder"),
        ("conversations.json/a/b", "conversations.json is a file, not a folder"),
        ("dangling", "dangling is a link to nowhere, and there is no such folder"),
        ("dangling/x", "dangling is a link to nowhere, and there is no such folder"),
        ("loop/x", "loop/x: Too many levels of symbolic links"),
        ("/dev/null/x", "/dev/null is a file, not a folder"),
        ("x" * 256, "a name in it has 256 bytes, and file systems take 255"),
        ("名" * 86, "a name in it has 258 bytes, and file systems take 255"),
        ("/x" * 2500, "bytes are more than a path can have"),
        ('"a\\0b"', "has a control character ('\\x00')"),
        ('"a\\e[31mb"', "has a control character ('\\x1b')"),
    ],
)
def test_what_no_folder_can_be(job_file, key, text, said, monkeypatch):
    """Said before anything is made, with the place and the part of the path that is wrong."""
    monkeypatch.chdir(job_file.parent)
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    (found,) = faults(job_file, f"{key}={text}")
    assert found.startswith(f"override {key}: ")
    assert said in found


def test_the_cache_beside_the_run_directory_must_be_a_folder(job_file):
    (job_file.parent / ".sft_job_cache").touch()
    assert faults(job_file) == [
        "job.yaml:2: data.cache_dir: .sft_job_cache, beside run.dir, is not a folder; set it"
    ]


@pytest.mark.parametrize("cache", ["/x/y/", "/x/y/cache", "/x/z/../y"])
def test_the_cache_lies_outside_of_the_run_directory(job_file, cache):
    """Encoding ahead would fill a run directory that has no job yet."""
    (found,) = faults(job_file, "run.dir=/x/y", f"data.cache_dir={cache}")
    assert "data.cache_dir: lies in the run directory" in found
    assert load(job_file, ["run.dir=/x/y", "data.cache_dir=/x/yy"])


def test_a_link_to_a_folder_is_a_folder(job_file):
    (job_file.parent / "real").mkdir()
    (job_file.parent / "link").symlink_to("real")
    assert load(job_file, [f"run.dir={job_file.parent}/link/x"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.train=" + "x" * 300, "a name in it has 300 bytes"),
        ("data.train=conversations.json/x", "conversations.json/x: Not a directory"),
        ("data.train=.", ". is a folder"),
        ("data.train=no/*.json", "no file matches no/*.json"),
        ("model.path=./conversations.json", "no such folder: conversations.json"),
        ("model.path=./conversations.json/x", "conversations.json/x: Not a directory"),
        ("model.path=./" + "x" * 300, "a name in it has 300 bytes"),
    ],
)
def test_what_is_not_there_is_named(job_file, override, said, monkeypatch):
    monkeypatch.chdir(job_file.parent)
    (found,) = faults(job_file, override)
    assert said.replace(". is a", f"{job_file.parent} is a") in found


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes somebody else")
def test_what_this_user_may_not_see_is_said(tmp_path):
    """Not `no file matches`: the folder is closed."""
    (tmp_path / "closed").mkdir(mode=0o700)
    (tmp_path / "closed/a.json").write_text("[]")
    os.chmod(tmp_path, 0o711)
    code = (
        f"import os; from sft_job.paths import unreadable; os.setuid(54321)\n"
        f"print(unreadable('{tmp_path}/closed/a.json')); print(unreadable('{tmp_path}/closed/*'))"
    )
    environ = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True
    )
    closed = f"{tmp_path}/closed"
    assert result.stdout.splitlines() == [
        f"{closed}/a.json: Permission denied", f"{closed}: Permission denied"
    ], result.stderr  # fmt: skip


# --- the job file itself -------------------------------------------------------------------


def test_what_is_no_job_file(tmp_path):
    """A pipe would wait for a writer, a device would never end, a model file takes minutes."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "big").write_bytes(b"#" * 300_000)
    (tmp_path / "binary").write_bytes(b"run: {dir: x}\n\xff\xfe")
    os.symlink("loop", tmp_path / "loop")
    for name, said in {
        "fifo": "cannot be read: not a file",
        "big": "cannot be read: more than 256 KiB; is it a job file?",
        "binary": "cannot be read: not UTF-8 text (line 2)",
        "loop": "cannot be read: Too many levels of symbolic links",
        "x" * 300: "cannot be read: File name too long",
    }.items():
        (found,) = faults(tmp_path / name)
        assert found.endswith(said)
    with pytest.raises(ConfigError, match=r"^/dev/zero: cannot be read: not a file$"):
        load("/dev/zero")


def test_a_mark_at_the_beginning_of_the_file_is_no_part_of_it(job_file):
    """Some editors begin a UTF-8 file with one."""
    job_file.write_text("\ufeff" + job_file.read_text(), encoding="utf-8")
    assert load(job_file)


def test_a_working_directory_that_is_gone(job_file, tmp_path):
    """Overrides cannot be relative to it; without them it is not needed."""
    code = (
        f"import os, shutil; os.makedirs('{tmp_path}/gone'); os.chdir('{tmp_path}/gone')\n"
        f"shutil.rmtree('{tmp_path}/gone')\n"
        "import sys; from sft_job import cli, plan\n"
        f"sys.exit(cli.run(plan.main, ['{job_file}', 'run.dir=x']))"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert "error: the working directory cannot be used: No such file or directory" in result.stderr
