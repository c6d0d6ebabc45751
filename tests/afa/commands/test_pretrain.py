"""A small pretraining of the bundled backbone, and the bundled weights."""

import json
from importlib import resources

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from afa.commands import pretrain
from afa.config import load_config
from afa.model.backbone import Backbone
from afa.model.weights import load_backbone_weights

SMALL = ["--crop", "32", "--batch-size", "8", "--workers", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch):
    monkeypatch.setattr(pretrain, "HELD_OUT", 64)


def run(out, images):
    pretrain.main(["--out", str(out), "--images", str(images), *SMALL])


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_writes_weights_and_card_and_nothing_else(tmp_path, capsys):
    run(tmp_path / "mini.safetensors", 40)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mini.md", "mini.safetensors"]
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["images"] == 40
    card = (tmp_path / "mini.md").read_text()
    assert "| 40 | 32 × 32 | 16 | 8 |" in card and "image-level tags only" in card
    with safe_open(tmp_path / "mini.safetensors", "pt") as file:
        assert file.metadata()["backbone"] == pretrain.BACKBONE
        assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118
    backbone = Backbone(pretrain.BACKBONE, pretrain.BACKBONE_ARGS)
    load_backbone_weights(backbone, str(tmp_path / "mini.safetensors"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_a_second_stage_starts_from_the_first(tmp_path, capsys):
    run(tmp_path / "first.safetensors", 8)
    second = tmp_path / "second.safetensors"
    options = ["--init", str(tmp_path / "first.safetensors"), "--output-stride", "8", "--lr", "1e-9", *SMALL]
    pretrain.main(["--out", str(second), "--images", "8", *options])
    card = second.with_suffix(".md").read_text()
    assert "| 8 | 32 × 32 | 16 | 8 | 0.0008 |" in card and "| 8 | 32 × 32 | 8 | 8 | 1e-09 |" in card
    first, after = (load_file(tmp_path / name) for name in ("first.safetensors", "second.safetensors"))
    for key, value in first.items():
        assert torch.equal(after[key], value), "this learning rate vanishes in half precision"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_resumes_from_a_state(tmp_path, monkeypatch, capsys):
    out = tmp_path / "mini.safetensors"
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 0.0)
    save = torch.save
    saved = []

    def save_then_die(state, path):
        save(state, path)
        saved.append(state["seen"])
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(out, 64)
    assert saved == [8, 16, 24]
    monkeypatch.setattr(torch, "save", save)
    run(out, 64)
    printed = capsys.readouterr().out
    assert "after 16 images" in printed  # saving the third state was interrupted before the file was renamed
    assert json.loads(printed.splitlines()[-1])["images"] == 64


def test_losses_share_the_target_among_an_images_tags():
    split = len(pretrain.PRETRAIN_SHAPES)
    tags = torch.zeros(2, len(pretrain.TAGS))
    tags[0, [0, 1, split]] = 1
    tags[1, split + 2] = 1  # a close-up: no outline
    logits = torch.zeros(2, len(pretrain.TAGS))
    outlines, textures = pretrain.tag_losses(logits, tags)
    torch.testing.assert_close(outlines, torch.tensor(split).log() / 2)
    torch.testing.assert_close(textures, torch.tensor(len(pretrain.TAGS) - split).log())


def test_bundled_weights_ship_with_their_card_and_fit_the_demo():
    folder = resources.files("afa") / "weights"
    names = [file.name for file in folder.iterdir() if file.name.endswith(".safetensors")]
    assert names
    for name in names:
        with resources.as_file(folder / name) as path:
            assert path.stat().st_size <= 12 * 2**20
        assert (folder / name.replace(".safetensors", ".md")).is_file()
    model = load_config("demo").model
    load_backbone_weights(Backbone(model.backbone, model.backbone_args), model.weights, model.backbone_args)
