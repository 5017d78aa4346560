"""Whether the plugins can be registered, as NVIDIA's own code and its registry take them, and when they cannot."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from types import GenericAlias, SimpleNamespace
from typing import Any

import nvidia_plugin
import pytest

from engines.flow_score import cache, launch, plugin
from engines.flow_score.launch import LOGITS, Variant
from engines.flow_score.plugin import NAMES
from flowcut.errors import EngineError

pytestmark = pytest.mark.usefixtures("on_sm_86")


def test_the_registry_knows_all_three(trt: Any) -> None:
    registry = trt.get_plugin_registry()
    assert [registry.get_creator(name, "1", "flowcut").name for name in NAMES.values()]
    plugin.register_plugin(trt)  # again changes nothing, where NVIDIA's code raises for a name that is taken
    assert plugin.plugin_errors() == []


@pytest.mark.parametrize(
    ("decorator", "change", "message"),
    [
        ("register", lambda p: dict.fromkeys(p, "TensorDesc"), "TensorDescs args should come first"),
        ("register", lambda p: p | {"group": "int"}, "'group' of type int is not a supported serializable type"),
        ("register", lambda p: dict(reversed(p.items())), "TensorDescs args should come first"),
        ("aot_impl", lambda p: dict(reversed(p.items())), "does not match the expected input arg schema"),
        ("aot_impl", lambda p: {n: a for n, a in p.items() if n != "tactic"}, "does not match"),
        ("aot_impl", lambda p: p | {"group": float}, "different from the one specified at registration"),
        ("impl", lambda p: {n: a for n, a in p.items() if n != "stream"}, "does not match"),
        ("autotune", lambda p: {n: a for n, a in p.items() if n != "outputs"}, "is not consistent"),
    ],
)
def test_nvidias_code_refuses_other_signatures(
    trt: Any, decorator: str, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    trtp = import_module("tensorrt.plugin")
    tensor = trtp.Tensor if decorator == "impl" else trtp.TensorDesc
    outputs = GenericAlias(tuple, (tensor, tensor))
    right = dict.fromkeys(launch.INPUTS[LOGITS], tensor) | plugin.ATTRIBUTES[LOGITS]
    more: dict[str, dict[str, Any]] = {
        "register": {},
        "autotune": {"outputs": outputs},
        "aot_impl": {"outputs": outputs, "tactic": int},
        "impl": {"outputs": outputs, "stream": int},
    }
    returns = {
        "register": outputs,
        "autotune": list[trtp.AutoTuneCombination],
        "aot_impl": tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs],
        "impl": None,
    }[decorator]

    def signed(parameters: dict[str, Any]) -> Any:
        def function(*_: Any) -> None: ...

        kind = plugin.Parameter.POSITIONAL_OR_KEYWORD
        given = [plugin.Parameter(name, kind, annotation=each) for name, each in parameters.items()]
        function.__signature__ = plugin.Signature(given, return_annotation=returns)  # type: ignore[attr-defined]
        return function

    op = "flowcut::FlowScoreLogits" if decorator != "register" else "flowcut::Another"
    with pytest.raises(ValueError, match=message):
        getattr(trtp, decorator)(op)(signed(change(right | more[decorator])))


@pytest.mark.parametrize("version", ["10.8.0.43", "8.6.1", "1.7.1.116"])
def test_a_tensorrt_without_such_plugins_is_refused(version: str) -> None:
    old = SimpleNamespace(__name__="tensorrt", __version__=version, QuickPluginCreationRequest=None)
    with pytest.raises(EngineError, match=rf"must have tensorrt 10\.9 or newer, got tensorrt {re.escape(version)}\."):
        plugin.register_plugin(old)


def test_tensorrt_rtx_is_refused() -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=r"got tensorrt_rtx 1\..* BACKEND=rtx"):
        plugin.register_plugin(rtx)


def test_a_tensorrt_whose_plugin_module_does_not_load_says_so() -> None:
    lean = SimpleNamespace(__name__="tensorrt_lean", __version__="10.9.0.34", QuickPluginCreationRequest=None)
    with pytest.raises(EngineError, match=r"tensorrt_lean\.plugin must load"):
        plugin.register_plugin(lean)


def test_a_machine_without_a_gpu_is_refused(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "gpu_sm", lambda: None)
    with pytest.raises(EngineError, match="must have a GPU to be built for, got none"):
        plugin.check_plugin(trt)


def test_a_gpu_without_ptx_is_refused_before_tensorrt_is_asked(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "gpu_sm", lambda: 75)
    with pytest.raises(EngineError, match="sm_75"):
        plugin.check_plugin(trt)
    monkeypatch.setattr(plugin, "gpu_sm", lambda: 86)
    monkeypatch.setattr(cache, "available", lambda module: False)
    with pytest.raises(EngineError, match=r"PTX of flow_score_logits-bf16-40 for sm_86 must be there"):
        plugin.check_plugin(trt, [Variant(LOGITS, "bf16", 40)])


def test_a_registry_that_does_not_take_a_plugin_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with nvidia_plugin.tensorrt() as fresh:
        monkeypatch.setattr(nvidia_plugin.Registry, "get_creator", lambda *_: None)
        with pytest.raises(EngineError, match="flowcut::FlowScoreLogits must be taken into the registry"):
            plugin.register_plugin(fresh)
        with pytest.raises(EngineError, match="flowcut::FlowScoreLogits must be taken into the registry"):
            plugin.register_plugin(fresh)  # nor does a second attempt succeed


@pytest.mark.parametrize("decorator", ["autotune", "impl", "aot_impl"])
def test_after_a_registration_that_broke_off_a_fresh_process_is_asked_for(decorator: str) -> None:
    def broken(op: str) -> Any:
        raise ValueError("no")

    with nvidia_plugin.tensorrt() as fresh:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fresh.plugin, decorator, broken)
            with pytest.raises(ValueError, match="no"):
                plugin.register_plugin(fresh)
        message = "FlowScoreLogits must be registered as a whole, got a part of it. Start a fresh process"
        with pytest.raises(EngineError, match=message):
            plugin.register_plugin(fresh)
