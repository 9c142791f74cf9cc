"""Storage `alias`: writing to shared weights is refused by name, and reading gives plain tensors."""

import copy
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headshare.errors import StorageError
from headshare.integrations.transformers.loading import unique_parameter_bytes
from support.aliases import Case, Q, logits
from support.processes import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="aliases are for Linux")

# What a user might try on `w`, the weight of a projection `proj` of `model`, whose state_dict's entry is `entry`.
WRITES = {
    "assigning an item": "w[0] = 1",
    "assigning an item of data": "w.data[0, 0] = 1",
    "assigning a slice of detach": "w.detach()[:, 1:3] = 0",
    "adding": "w += 1",
    "multiplying under no_grad": "with torch.no_grad(): w *= 2",
    "every operator": """
        import operator
        for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
            try:
                getattr(operator, name)(w, 2)
                raise SystemExit(f"{name} went through")
            except hs.errors.StorageError:
                pass
        w.copy_(w)""",
    "zero_": "w.zero_()",
    "data.zero_": "w.data.zero_()",
    "detach().add_": "w.detach().add_(1)",
    "copy_": "w.copy_(torch.zeros_like(w))",
    "fill_ through a transposed diagonal": "w.T.diagonal().fill_(1)",
    "writing through a view of other numbers": "w.view(torch.int32).zero_()",
    "writing through narrow and squeeze": "w.narrow(0, 0, 1).squeeze(0).zero_()",
    "writing through split": "torch.split(w, 8)[1].zero_()",
    "writing through chunk": "w.chunk(2)[1].mul_(2)",
    "writing through unbind": "[row.zero_() for row in w.unbind(0)]",
    "writing in a loop over rows": "for row in w: row.zero_()",
    "writing through expand": "w[:1].expand(4, -1).zero_()",
    "writing through cpu()": "w.cpu().zero_()",
    "writing through to() and float()": "w.to('cpu').float().zero_()",
    "writing through contiguous()": "proj.weight.contiguous().zero_()",
    "writing through as_tensor": "torch.as_tensor(w).zero_()",
    "writing through asarray": "torch.asarray(w).zero_()",
    "writing through broadcast_tensors": "torch.broadcast_tensors(w, w)[0].zero_()",
    "index_copy_": "w.index_copy_(0, torch.tensor([0]), torch.zeros(1, 64))",
    "masked_fill_": "w.masked_fill_(w > 0, 0)",
    "scatter_": "w.scatter_(0, torch.zeros(1, 64).long(), 0)",
    "random_": "w.random_()",
    "apply_": "w.apply_(lambda number: 0)",
    "resize_": "w.resize_(3)",
    "set_": "w.set_(torch.zeros(3)); model.save_pretrained(sys.argv[2])",
    "unbound add_": "torch.Tensor.add_(w, 1)",
    "unbound __setitem__": "torch._C.TensorBase.__setitem__(w, 0, 1)",
    "setting data": "w.data = torch.zeros(w.shape)",
    "setting data of a registered parameter": "proj._parameters['weight'].data = torch.zeros(w.shape)",
    "out of add": "torch.add(w, 1, out=w)",
    "out of zeros": "torch.zeros(w.shape, out=w)",
    "out of randn": "torch.randn(w.shape, out=w.data)",
    "out of mm, transposed": "torch.mm(torch.zeros(64, 3), torch.zeros(3, w.shape[0]), out=w.T)",
    "out of max, in a tuple": "torch.max(w, dim=0, out=(w[0], torch.zeros(64).long()))",
    "out of cat": "torch.cat([torch.zeros(w.shape)], out=w)",
    "fill_ of torch": "torch.fill_(w, 0)",
    "relu_ of torch": "torch.relu_(w)",
    "relu with inplace": "F.relu(w, inplace=True)",
    "dropout with inplace": "F.dropout(w, 0.5, True, inplace=True)",
    "dropout with inplace, by position": "F.dropout(w, 0.5, True, True)",
    "leaky_relu of data with inplace": "F.leaky_relu(w.data, inplace=True)",
    "hardtanh with inplace": "F.hardtanh(w, -1e-3, 1e-3, inplace=True)",
    "a module with inplace": "nn.ReLU(inplace=True)(w)",
    "SiLU with inplace": "nn.SiLU(inplace=True)(w)",
    "embedding with max_norm": "F.embedding(torch.tensor([0, 1]), w, max_norm=1e-3)",
    "running statistics of batch_norm": "F.batch_norm(torch.randn(4, 64), w[0], w[1], training=True)",
    "an aten packet": "torch.ops.aten.add_(w, 1)",
    "an aten overload": "torch.ops.aten.add_.Tensor(w, 1)",
    "aten's copy_": "torch.ops.aten.copy_.default(w, torch.zeros(w.shape))",
    "aten's out": "torch.ops.aten.mul.out(w, w, out=w)",
    "foreach add": "torch._foreach_add_([w], 1)",
    "foreach mul, second of a list": "torch._foreach_mul_([torch.zeros(3), w.data], 2.0)",
    "foreach copy": "torch._foreach_copy_([w], [torch.zeros(w.shape)])",
    "foreach zero": "torch._foreach_zero_([w.detach()])",
    "vmap": "torch.vmap(lambda row: row.add_(1))(w)",
    "SGD": "w.grad = torch.ones(w.shape); torch.optim.SGD([w], lr=1.0).step()",
    "SGD foreach": "w.grad = torch.ones(w.shape); torch.optim.SGD([w], lr=1.0, foreach=True).step()",
    "SGD fused": "w.grad = torch.ones(w.shape); torch.optim.SGD([w], lr=1.0, fused=True).step()",
    "AdamW": "w.grad = torch.ones(w.shape); torch.optim.AdamW([w], lr=1.0).step()",
    "AdamW foreach": "w.grad = torch.ones(w.shape); torch.optim.AdamW([w], lr=1.0, foreach=True).step()",
    "AdamW fused": "w.grad = torch.ones(w.shape); torch.optim.AdamW([w], lr=1.0, fused=True).step()",
    "AdamW of all parameters": """
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(list(dict(model.named_parameters(prefix="x")).values())[1:2], lr=1.0).step()""",
    "init.zeros_": "nn.init.zeros_(w)",
    "init.normal_": "nn.init.normal_(w)",
    "init.uniform_ of data": "nn.init.uniform_(w.data)",
    "init.xavier_uniform_": "nn.init.xavier_uniform_(w)",
    "init.kaiming_normal_": "nn.init.kaiming_normal_(w)",
    "init.trunc_normal_": "nn.init.trunc_normal_(w)",
    "init.orthogonal_": "nn.init.orthogonal_(w)",
    "init.eye_": "nn.init.eye_(w)",
    "init.sparse_": "nn.init.sparse_(w, 0.1)",
    "a state_dict's value": "entry.zero_()",
    "a state_dict's value with keep_vars": f"model.state_dict(keep_vars=True)['{Q}'].zero_()",
    "a named parameter": f"dict(model.named_parameters())['{Q}'].data.zero_()",
    "load_state_dict of a module": """
        proj.load_state_dict({k: torch.zeros(v.shape) for k, v in proj.state_dict().items()})""",
    "load_state_dict of a module with assign": """
        proj.load_state_dict({k: torch.zeros(v.shape) for k, v in proj.state_dict().items()}, assign=True)""",
    "replacing the weight": "proj.weight = nn.Parameter(torch.zeros(w.shape))",
    "replacing the weight by a frozen one": "proj.weight = nn.Parameter(torch.zeros(w.shape), requires_grad=False)",
    "pruning": "import torch.nn.utils.prune as prune; prune.random_unstructured(proj, 'weight', 0.5)",
    "vector_to_parameters": "nn.utils.vector_to_parameters(torch.zeros(w.numel()), [w])",
    "moving averages": """
        averaged = torch.optim.swa_utils.AveragedModel(proj)
        averaged.update_parameters(proj)
        averaged.update_parameters(proj)""",
    "the whole weight": "proj.whole_weight().zero_()",
    "an item of the whole weight": "proj.whole_weight()[0] = 1",
    "requires_grad_": "w.requires_grad_(True)",
    "requires_grad_ without a word": "w.requires_grad_()",
    "requires_grad": "w.requires_grad = True",
    "requires_grad of data": "w.data.requires_grad = True",
    "requires_grad_ of the model": "model.requires_grad_(True)",
    "a trainable parameter on it": "nn.Parameter(w)",
    "a trainable parameter on its data": "nn.Parameter(w.data)",
    "a frozen parameter on its data": "nn.Parameter(w.data, requires_grad=False).zero_()",
    "accelerate's setter": """
        from accelerate.utils import set_module_tensor_to_device
        set_module_tensor_to_device(proj, 'weight', 'cpu', value=torch.zeros(w.shape))""",
    "accelerate's offload": "import accelerate; accelerate.cpu_offload(model, torch.device('cpu'))",
    "a hook that writes": """
        def hook(module, inputs): module.weight.data.zero_()
        proj.register_forward_pre_hook(hook)
        try: model(tiny.tokens())
        finally: proj._forward_pre_hooks.clear()""",
}
ARRAY_WRITES = {
    "an array's item": "w.numpy()[0] = 1",
    "an array of a view": "w.T[1:].numpy()[0] = 1",
    "an array of data": "w.data.numpy().fill(0)",
    "an array of detach": "w.detach().numpy().sort()",
    "asarray": "np.asarray(w)[0] = 1",
    "a view of an array": "w.numpy().view(np.int32)[0] = 1",
    "out of a ufunc": "np.add(w.numpy(), 1, out=w.numpy())",
    "making an array writable": "w.numpy().flags.writeable = True",
    "setflags": "w.numpy().setflags(write=True)",
}

READINGS = """
    w.clone() | w + 0 | w.double() | w.to(torch.float16) | -w | w @ w.T | w.reshape(-1).clone() | w.sum() | w[[0, 1]]
    w[w > 0] | torch.stack([w, w]) | torch.empty_like(w).zero_() | torch.zeros_like(w) | torch.cat([w, w]) | w.relu()
    F.linear(torch.ones(1, 64), w) | w.new_zeros(3) | torch.from_dlpack(w) | torch.svd(w)[1] | w.where(w > 0, 0.0)
    copy.deepcopy(w) | copy.copy(w) | pickle.loads(pickle.dumps(w)) | pickle.loads(pickle.dumps(w.data))
    copy.deepcopy(entry) | copy.deepcopy(w.T) | F.relu(w) | F.dropout(w, 0.5, True) | w.index_fill(0, w[0].long(), 0)
    F.embedding(torch.tensor([0, 1]), w) | torch.from_numpy(w.numpy().copy()) | torch.tensor(w.numpy()) | w.mean(0)
"""
READS = {
    code.strip(): f"""
        found = {code.strip()}
        found.detach().zero_()
        assert type(found) in (torch.Tensor, nn.Parameter), type(found)"""
    for line in READINGS.strip().splitlines()
    for code in line.split(" | ")
}


@pytest.fixture(scope="module")
def attempts(cases: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What came of each attempt, in a fork of its own: an error's name, or `nothing`; `signal`, if it killed; and
    `, then ...` if the model was not as before."""
    script = """
    import textwrap
    import numpy as np
    import torch._dynamo  # optimizers bring it in; once is enough
    import accelerate, torch.nn.utils.prune, torch.optim.swa_utils
    from torch import nn
    from torch.nn import functional as F
    model = load_model(hs.open_checkpoint(sys.argv[1]), storage="alias")
    proj = model.model.layers[0].self_attn.q_proj
    w, entry = proj.weight, model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    tokens = tiny.tokens()
    expected = model(tokens).logits.detach()
    whole = proj.whole_weight().clone()

    def attempt(code):
        try:
            exec(textwrap.dedent(code), globals())
            found = "nothing"
        except BaseException as error:
            found = type(error).__name__
        try:
            same = torch.equal(proj.whole_weight(), whole) and torch.equal(model(tokens).logits, expected)
            return found + ("" if same else ", then other numbers")
        except BaseException as error:
            return found + f", then {type(error).__name__}"

    found = {}
    for name, code in json.load(open(sys.argv[3])).items():
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(writer, attempt(code).encode())
            os._exit(0)
        os.close(writer)
        said = open(reader, "rb").read().decode()
        _, status = os.waitpid(child, 0)
        found[name] = said or f"signal {status}"
    print(json.dumps(found))
    """
    folder = tmp_path_factory.mktemp("attempts")
    (folder / "writes.json").write_text(json.dumps({**WRITES, **ARRAY_WRITES, **READS}))
    said = run(script, cases("paged").shared, folder / "saved", folder / "writes.json", PYTHONWARNINGS="ignore")
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("attempt", WRITES)
def test_writing_is_refused_by_name_and_changes_nothing(attempts: dict[str, str], attempt: str) -> None:
    assert attempts[attempt] == "StorageError"


@pytest.mark.parametrize("attempt", ARRAY_WRITES)
def test_arrays_of_it_are_read_only(attempts: dict[str, str], attempt: str) -> None:
    assert attempts[attempt] == "ValueError"


def test_a_refusal_says_what_to_do(paged: Case) -> None:
    weight = paged.load().model.layers[0].self_attn.q_proj.weight
    with pytest.raises(StorageError, match=r'read-only.*zero_.*storage="owner".*clone\(\)'):
        weight.zero_()


def test_loading_other_weights_into_the_model_is_refused(paged: Case) -> None:
    model = paged.load()
    expected = logits(model)
    with pytest.raises(StorageError):
        model.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), expected)


def test_a_reparametrised_weight_is_refused_or_used(paged: Case) -> None:
    """The product does not read `weight`: replacing it by what computes it must not go unnoticed."""

    class Nothing(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return torch.zeros_like(weight)

    projection = paged.load().model.layers[0].self_attn.q_proj
    with pytest.raises(StorageError):
        nn.utils.parametrize.register_parametrization(projection, "weight", Nothing())


def test_a_functional_call_with_other_weights_is_refused_or_uses_them(paged: Case) -> None:
    projection = paged.load().model.layers[0].self_attn.q_proj
    x = torch.randn(2, 64)
    given = {"weight": torch.zeros(projection.weight.shape), "bias": projection.bias.detach()}
    try:
        with torch.no_grad():
            found = torch.func.functional_call(projection, given, x)
    except StorageError:
        return
    assert torch.equal(found, projection.bias.detach().expand(2, -1)), "the weights that were given were ignored"


@pytest.mark.parametrize("attempt", READS)
def test_reading_gives_plain_tensors_that_may_be_written(attempts: dict[str, str], attempt: str) -> None:
    assert attempts[attempt] == "nothing"


def test_reading_is_as_of_any_parameter(paged: Case) -> None:
    weight = paged.load().model.layers[0].self_attn.q_proj.weight
    stock = paged.stock().model.layers[0].self_attn.q_proj.weight
    kept = weight.shape[0]
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert weight.is_leaf
    assert float(weight[0, 0]) == float(stock[0, 0].detach())
    assert weight.tolist() == stock[:kept].tolist()
    assert np.array_equal(weight.numpy(), stock[:kept].detach().numpy())
    assert np.asarray(weight).sum() == stock[:kept].detach().numpy().sum()
    assert torch.equal(weight, stock[:kept])
    assert (weight == stock[:kept]).all()
    assert weight in {weight}
    assert "read-only" in repr(weight).lower()
    assert type(pickle.loads(pickle.dumps(weight))) is nn.Parameter
    assert type(copy.deepcopy(weight)) is nn.Parameter
    weight.requires_grad_(False)
    weight.share_memory_()
    assert weight.detach_() is weight
    weight.grad = None
    assert nn.utils.clip_grad_norm_([weight], 1.0) == 0


def test_a_frozen_model_can_be_frozen_again(paged: Case) -> None:
    model = paged.load().requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["paged", "padded", "gpt2"])
def test_a_state_dict_is_saved_by_torch_as_plain_tensors_each_once(
    cases: Callable[[str], Case], kind: str, tmp_path: Path
) -> None:
    model = cases(kind).load()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {type(tensor) for tensor in loaded.values()} <= {Tensor, nn.Parameter}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert (tmp_path / "state.pt").stat().st_size < 1.1 * unique_parameter_bytes(cases(kind).load("owner")) + 50_000


@pytest.mark.parametrize("kind", ["paged", "padded", "gpt2"])
def test_a_state_dict_is_saved_by_safetensors_as_a_stock_models_is(
    cases: Callable[[str], Case], kind: str, tmp_path: Path
) -> None:
    state = cases(kind).load().state_dict()
    tied = {"lm_head.weight"} if kind == "gpt2" else set()  # which safetensors refuses in a stock model too
    save_file({name: tensor for name, tensor in state.items() if name not in tied}, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)
