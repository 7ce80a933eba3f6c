"""`train.remat: auto`: what is tried, what is chosen, and what a run or the cache remembers."""

import jax
import pytest
from helpers import tiny_config

from lm2_jax.common.errors import TrainingFailed, UserError
from lm2_jax.compiled import remat
from lm2_jax.compiled.remat import Tried, best_policy, choose, explain_remat, with_remat
from lm2_jax.config import replace, save_config
from lm2_jax.parallel.chips import CHIPS
from lm2_jax.tokenizer import with_vocabulary

V5E = CHIPS["v5e"]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Policies that were compiled; a policy's seconds at best are set in `.seconds`, None: it does not fit."""

    class Compiled(list):
        def __init__(self):
            self.seconds = {"none": None, "block": 3.0, "full": 2.0, "offload": 4.0}

    done = Compiled()

    def compile_program(lowered, chip, config, mesh_shape, flops):
        assert lowered.as_text() and flops > 0
        done.append(config.train.remat)
        step = done.seconds[config.train.remat]
        fits = {"fits": True, "peak_bytes": 2**30, "roofline": {"step": step}}
        return "", fits if step else {"fits": False, "peak_bytes": None}

    monkeypatch.setattr(remat, "compile_program", compile_program)
    monkeypatch.setattr(remat, "_versions", lambda: {"jax": "1"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return done


def config_of(tmp_path):
    return with_vocabulary(tiny_config(tmp_path / "run", "train.remat=auto", "data.batch_size=8"))


def test_the_fastest_that_fits_is_compiled_for_once(compiled, tmp_path, capsys):
    config = config_of(tmp_path)
    assert best_policy(config, jax.devices(), V5E, print) == "full"
    assert compiled == ["none", "block", "full"]
    assert "none                  ?   does not fit" in capsys.readouterr().out
    assert best_policy(config, jax.devices(), V5E, print) == "full" and len(compiled) == 3
    compiled.seconds = {"none": None, "block": 1.0, "full": 2.0}
    assert best_policy(config, jax.devices(), CHIPS["v5p"], print) == "block" and len(compiled) == 6
    file = tmp_path / "cache" / "lm2_jax" / "remat.json"
    file.write_text("[]")
    assert best_policy(config, jax.devices(), V5E, print) == "block" and len(compiled) == 9
    file.unlink()
    file.mkdir()  # neither to be read nor to be written
    assert best_policy(config, jax.devices(), V5E, print) == "block" and len(compiled) == 12
    assert "cannot be written (" in capsys.readouterr().out


def test_the_host_is_the_last_resort(compiled, tmp_path):
    compiled.seconds = dict.fromkeys(("none", "block", "full"), None) | {"offload": 9.0}
    assert explain_remat(config_of(tmp_path), jax.devices(), V5E, print).endswith("auto is offload")
    compiled.seconds = dict.fromkeys(compiled.seconds, None)
    with pytest.raises(TrainingFailed, match=r"no policy that fits \(none, block, full, offload were compiled\)"):
        explain_remat(config_of(tmp_path), jax.devices(), V5E, print)


def test_ties_keep_more():
    assert choose([Tried("none", 1.0, 2.0), Tried("block", 1.0, 2.0)]) == "none"


def test_a_run_keeps_its_choice(compiled, tmp_path, monkeypatch):
    """On a CPU it is none; one that was chosen elsewhere stays; other devices are named."""
    config = config_of(tmp_path)
    assert with_remat(config, print).train.remat == "none" and config.spec.remat == "none"
    assert with_remat(replace(config, train={"remat": "block"}), print).train.remat == "block"
    with monkeypatch.context() as patched:
        patched.setattr(jax, "devices", lambda: [Device("tpu", "TPU v5 lite")])
        patched.setattr(remat, "best_policy", lambda config, devices, chip, log: "full" if chip == V5E else "none")
        assert with_remat(config, print).train.remat == "full"
    monkeypatch.setattr(jax, "devices", lambda: [Device("gpu", "H100")])
    with pytest.raises(UserError, match="auto knows the memory of v5e, v5p, v6e; found H100"):
        with_remat(config, print)
    (tmp_path / "run").mkdir()
    save_config(replace(config, train={"remat": "full"}), tmp_path / "run" / "config.yaml")
    assert with_remat(config, print).train.remat == "full" and not compiled


class Device:
    def __init__(self, platform, device_kind):
        self.platform, self.device_kind = platform, device_kind
