"""Matrix products by oneDNN and the loss in chunks: the same values and gradients as torch's own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.utils.flop_counter import FlopCounterMode

from upcycling import kernels as kernels_door
from upcycling.checks import IGNORE
from upcycling.core import experts as experts_module, moe
from upcycling.core.config import ModelConfig, MoEConfig
from upcycling.core.experts import Linear, linear
from upcycling.core.model import DecoderLM, loss_in_chunks
from upcycling.core.routing import Routing
from upcycling.kernels import choice, expert_by_expert, few_rows, private, products
from upcycling.kernels.products import weight_gradient

has_onednn = pytest.mark.skipif(
    private.linear_pointwise is None,
    reason="this build of torch has no oneDNN product",
)


@pytest.fixture(params=[pytest.param(True, marks=has_onednn), False], ids=["onednn", "torch"])
def onednn(request, monkeypatch):
    """Either way, whatever this machine would choose."""
    return take(monkeypatch, request.param)


KERNELS = (products.ONEDNN, few_rows.ONE_ROW, few_rows.TWO_TO_FOUR_ROWS, expert_by_expert.MANY, expert_by_expert.FEW)


def take(monkeypatch, taken=True, kernels=KERNELS):
    """Let `kernels` be taken, or not, whatever is faster here; UPCYCLING_KERNELS=0 does not count."""
    for module in (choice, kernels_door):
        monkeypatch.setattr(module, "ON", True)
    for kernel in kernels:
        monkeypatch.setitem(choice._taken, kernel.name, taken)
    return taken


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def assert_close(ours, theirs, relative=1e-6):
    """Equal within `relative` of the largest entry: sums in another order."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and float((a - b).detach().abs().max()) <= relative * float(b.detach().abs().max())


@pytest.mark.parametrize("shape", [(300,), (1, 300), (7, 300), (2, 5, 300), (0, 300), (64, 300)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_that_of_torch(shape, bias, onednn):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(260, 300, requires_grad=True)
    wanted = [x, weight] + ([torch.randn(260, requires_grad=True)] if bias else [])
    bias_O = wanted[2] if bias else None
    ours, theirs = linear(x, weight, bias_O), F.linear(x, weight, bias_O)
    dy = torch.randn_like(theirs)
    if x.numel():
        assert_close([ours, *gradients((ours * dy).sum(), *wanted)], [theirs, *gradients((theirs * dy).sum(), *wanted)])
    assert ours.shape == theirs.shape
    expanded = gradients(linear(x, weight, bias_O).sum(), *wanted)  # a gradient whose strides are all 0
    if x.numel():
        assert_close(expanded, gradients(F.linear(x, weight, bias_O).sum(), *wanted))


@has_onednn
@pytest.mark.parametrize("rows, narrow, wide", [(256, 256, 1024), (255, 256, 1024), (256, 256, 1023), (300, 513, 2100)])
def test_a_wide_weights_gradient(rows, narrow, wide, monkeypatch):
    take(monkeypatch)
    x, weight, dy = torch.randn(rows, narrow), torch.randn(wide, narrow, requires_grad=True), torch.randn(rows, wide)
    found = weight_gradient(dy, x)
    assert found.is_contiguous() == ((rows, narrow, wide) != (256, 256, 1024)), "the transpose of x.T @ dy"
    assert_close([found], [dy.t() @ x])
    linear(x, weight).backward(dy)
    assert weight.grad.is_contiguous() and torch.equal(weight.grad, found)


def test_only_the_gradients_that_are_wanted_are_computed(onednn):
    x, weight = torch.randn(8, 256), torch.randn(256, 256, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 8 * 256 * 256  # forward, and the weight's gradient
    with torch.no_grad():
        assert not linear(x, weight).requires_grad


@has_onednn
def test_what_onednn_does_not_take(monkeypatch):
    take(monkeypatch)
    x, weight = torch.randn(4, 256), torch.randn(256, 256)
    fits = products.fits
    assert fits(x, weight) and not fits(x[:0], weight)
    assert not fits(x.double(), weight.double()) and not fits(x.bfloat16(), weight.bfloat16())
    assert not fits(x, torch.randn(255, 256)) and not fits(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    layer = Linear(256, 256)
    assert set(layer.state_dict()) == {"weight", "bias"} and isinstance(layer, torch.nn.Linear)


def small_moe(**fields):
    sizes = dict(vocab_size=64, d_model=256, n_layers=2, n_heads=4, d_ff=320, seq_len=32)
    return DecoderLM(ModelConfig.smol(**sizes, moe=MoEConfig(num_experts=4, top_k=2), **fields))


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("load", ["router", "one expert", "empty experts"])
def test_experts_are_those_of_the_loop_values_and_gradients(activation, bias, load, onednn):
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=8, d_model=256, n_layers=1, n_heads=1, d_ff=1024, seq_len=8, activation=activation, ffn_bias=bias,
        moe=MoEConfig(num_experts=4, top_k=1 if load == "one expert" else 2),
    )  # fmt: skip
    layer = moe.MoELayer(config)
    for weight in layer.experts.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    x_ND = torch.randn(33, 256, requires_grad=True)
    routing = layer.route(x_ND)
    if load == "one expert":
        probabilities_NE, ids_NK = routing.probabilities_NE, torch.full((33, 1), 2)
        routing = Routing(routing.logits_NE, probabilities_NE, ids_NK, probabilities_NE[:, 2:3])
    if load == "empty experts":
        ids_NK = torch.tensor([[1, 3]]).expand(33, 2)
        routing = Routing(routing.logits_NE, routing.probabilities_NE, ids_NK, routing.weights_NK)
    wanted = [x_ND, layer.router.weight, *layer.experts.parameters()]
    dy_ND, results = torch.randn(33, 256), []
    for compute in (moe.experts_sorted, moe.experts_loop):
        y_ND = compute(layer.experts, x_ND, routing)
        found = torch.autograd.grad((y_ND * dy_ND).sum(), wanted, retain_graph=True, allow_unused=True)
        results.append([y_ND.detach(), *(g if g is not None else torch.zeros(1) for g in found)])
    assert_close(*results, relative=2e-6)


def experts_of(activation, count, rows, seed=0):
    """Experts of width 256 by 1,024, with rows sorted by expert and how many each has."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=8, d_model=256, n_layers=1, n_heads=1, d_ff=1024, seq_len=8, activation=activation)
    experts = experts_module.Experts(ModelConfig(**sizes, moe=MoEConfig(num_experts=count, top_k=1)))
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    counts_E = torch.tensor(rows)
    return experts, torch.randn(sum(rows), 256), torch.arange(count).repeat_interleave(counts_E), counts_E


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12))
def test_blocks_hold_each_experts_rows_and_hardly_more(counts):
    ends = [sum(counts[: e + 1]) for e in range(len(counts))]
    blocks = list(expert_by_expert._blocks(counts))
    assert [e for e, *_ in blocks] == [e for e, count in enumerate(counts) if count]
    for e, rows, block, own in blocks:
        assert rows == slice(ends[e] - counts[e], ends[e]), "sorted by expert"
        size = block.stop - block.start
        assert block.start >= 0 and block.stop <= sum(counts)
        assert range(sum(counts))[block][own] == range(sum(counts))[rows]
        assert counts[e] <= size <= counts[e] + max(3, counts[e] / 32)
        assert size == sum(counts) or (size % 4 == 0 and size.bit_length() - (size & -size).bit_length() <= 5)


def test_few_sizes_of_blocks_serve_all_numbers_of_rows():
    blocks = [next(expert_by_expert._blocks([n, 10**6]))[2] for n in range(1, 2049)]
    assert len({block.stop - block.start for block in blocks}) == 64 + 3 * 32


@has_onednn
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("rows", [[130, 0, 257, 65, 1], [0, 3, 0, 600, 0], [7, 7, 7, 7, 7], [3, 0, 0, 0, 6]])
def test_rows_of_neighbours_in_a_block_change_nothing(activation, rows, monkeypatch):
    take(monkeypatch)
    experts, x_RD, ids_R, counts_E = experts_of(activation, 5, rows)
    wanted, dy_RD = [x_RD.requires_grad_(), *experts.parameters()], torch.randn_like(x_RD)
    calls = []
    apply = expert_by_expert._ExpertByExpert.apply
    monkeypatch.setattr(expert_by_expert._ExpertByExpert, "apply", lambda *a: calls.append(a) or apply(*a))
    ours_RD = experts(x_RD, ids_R, counts_E) if sum(rows) >= 20 else expert_by_expert._ExpertByExpert.apply(
        experts.activate, activation, rows, x_RD, experts.w_up_EFD, experts.w_gate_EFD, experts.w_down_EDF,
        experts.b_up_EF, experts.b_gate_EF, experts.b_down_ED,
    )  # fmt: skip
    theirs_RD = torch.cat([experts.expert(e, x) for e, x in enumerate(x_RD.split(rows))])
    larger = any(b.stop - b.start != rows[e] for e, _, b, _ in expert_by_expert._blocks(rows))
    assert calls and larger, "some block has rows of a neighbour"
    found = [[y, *gradients((y * dy_RD).sum(), *wanted)] for y in (ours_RD, theirs_RD)]
    assert_close(*found, relative=2e-6)
    for e, count in enumerate(rows):
        if count == 0:
            assert all(not gradient[e].any() for gradient in found[0][2:])


@has_onednn
def test_frozen_experts_cost_no_gradients(monkeypatch):
    take(monkeypatch)
    experts, x_RD, ids_R, counts_E = experts_of("gelu", 4, [50, 60, 70, 80])

    def backward_flops():
        y_RD = experts(x_RD.requires_grad_(), ids_R, counts_E)
        with FlopCounterMode(display=False) as counter:
            y_RD.sum().backward()
        return counter.get_total_flops()

    both = backward_flops()
    experts.w_up_EFD.requires_grad_(False)
    experts.w_up_EFD.grad = experts.w_down_EDF.grad = None
    assert backward_flops() == both * 3 // 4 and experts.w_up_EFD.grad is None
    assert experts.w_down_EDF.grad.abs().sum() > 0


def test_memory_of_a_large_gradient_is_taken_again_when_it_is_out_of_use():
    weight = torch.nn.Parameter(torch.empty(2**23 + 1))
    first = expert_by_expert.gradient_like(weight)
    place = first.data_ptr()
    assert (first.shape, first.dtype, first.requires_grad) == (weight.shape, weight.dtype, False)
    second = expert_by_expert.gradient_like(weight)
    assert second.data_ptr() != place, "the first one is still there"
    view, place = second[5:6], second.data_ptr()
    del second
    assert expert_by_expert.gradient_like(weight).data_ptr() != place, "a part of it is still there"
    del view
    third = expert_by_expert.gradient_like(weight)
    place = third.data_ptr()
    del third
    assert expert_by_expert.gradient_like(weight).data_ptr() == place
    assert weight in expert_by_expert._last
    small = torch.nn.Parameter(torch.empty(8, 8).t())
    assert expert_by_expert.gradient_like(small).stride() == small.stride() and small not in expert_by_expert._last
    before = len(expert_by_expert._last)
    del weight
    assert len(expert_by_expert._last) == before - 1, "it goes with its weight"


@has_onednn
def test_gradients_in_kept_memory_are_those_of_each_update(monkeypatch):
    """Updates with and without zero_grad, a copy that somebody keeps, experts without rows in between."""
    take(monkeypatch)
    experts, *_ = experts_of("gelu", 4, [1, 1, 1, 1])
    kept, expected, taken = [], [], []
    for kept_from in (2**62, 0):  # never, always
        monkeypatch.setattr(expert_by_expert, "KEPT_BYTES", kept_from)
        for p in experts.parameters():
            p.grad = None
        found = []
        for update, rows in enumerate(
            [[30, 30, 30, 30], [60, 0, 50, 1], [9, 8, 90, 0], [30, 30, 30, 30], [50, 9, 30, 30]]
        ):
            torch.manual_seed(update)
            x_RD = torch.randn(sum(rows), 256)
            ids_R = torch.arange(4).repeat_interleave(torch.tensor(rows))
            experts(x_RD, ids_R, torch.tensor(rows)).square().sum().backward()
            found.append(experts.w_up_EFD.grad.clone())
            taken.append(experts.w_up_EFD.grad.data_ptr())
            if update == 0:
                kept.append((experts.w_down_EDF.grad, experts.w_down_EDF.grad.clone()))  # held over all updates
            if update != 1:  # once two updates are added up
                for p in experts.parameters():
                    p.grad = None
        expected.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*expected))
    assert all(torch.equal(held, copy) for held, copy in kept)
    assert taken[-1] == taken[-2], "memory was taken again"


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(320, 256), (256, 2304), (64, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_handful_of_rows_without_gradients(rows, shape, bias, onednn, monkeypatch):
    torch.manual_seed(0)  # float32 adds up to 2,304 products: MKL_CBWR=COMPATIBLE is 2.03e-6 away
    weight, bias_O = torch.randn(shape), torch.randn(shape[0]) if bias else None
    for x in (torch.randn(rows, shape[1]), torch.randn(shape[1], rows).t(), torch.randn(rows, 2 * shape[1])[:, ::2]):
        exact = F.linear(x.double(), weight.double(), None if bias_O is None else bias_O.double())
        with torch.no_grad():
            assert_close([linear(x, weight, bias_O).double()], [exact], 5e-6)
            if onednn and rows <= 4 and shape[1] <= 2048:
                assert_close([few_rows.few_rows_linear(x, weight, bias_O).double()], [exact], 5e-6)
        assert linear(x, weight, bias_O).requires_grad is False
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close([linear(x, weight, bias_O).double()], [exact], 2e-2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(x, weight, bias_O)
    assert counter.get_total_flops() == 2 * rows * weight.numel()
    taken, few = [], products.few_rows_linear
    monkeypatch.setattr(products, "few_rows_linear", lambda *a: taken.append(a) or few(*a))
    with torch.no_grad():
        linear(x, weight, bias_O)
    assert bool(taken) == (rows <= 4 and min(shape) >= 256), "linear asks for this way where it may pay"


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("tokens", [2, 5, 7, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_few_tokens_without_gradients(activation, tokens, bias, onednn, monkeypatch):
    layer = small_moe(activation=activation, ffn_bias=bias).blocks[0].ffn
    x_ND = torch.randn(tokens, 256)
    taken, few = [], expert_by_expert.few_rows_linear
    monkeypatch.setattr(expert_by_expert, "few_rows_linear", lambda x, *a: taken.append(len(x)) or few(x, *a))
    with torch.no_grad():
        routing = layer.route(x_ND)
        ours_ND, theirs_ND = (f(layer.experts, x_ND, routing) for f in (moe.experts_sorted, moe.experts_loop))
    assert_close([ours_ND], [theirs_ND], 2e-6)
    assert bool(taken) == (onednn and tokens < 8), "fewer than four rows for each of the four experts"
    assert max(taken, default=0) <= tokens
    taken.clear()
    assert layer(x_ND[None])[0].requires_grad and not taken


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_single_token_without_sorting_is_the_same(activation, bias, onednn):
    torch.manual_seed(0)
    layer = small_moe(activation=activation, ffn_bias=bias).blocks[0].ffn
    x_1D = torch.randn(1, 256)
    routing = layer.route(x_1D)
    assert few_rows.faster_one_token(layer.experts, x_1D, routing) is None, "not where gradients are wanted"
    with torch.no_grad():
        ours_1D = few_rows.faster_one_token(layer.experts, x_1D, routing)
        assert_close([ours_1D], [moe.experts_loop(layer.experts, x_1D, routing)], 2e-6)
        assert torch.equal(layer(x_1D[None])[0][0], ours_1D)  # the path that the layer takes
        wide, x_1D = layer.double().experts, x_1D.double()
        ours_1D = few_rows.faster_one_token(wide, x_1D, routing)
        assert_close([ours_1D], [moe.experts_loop(wide, x_1D, routing)], 1e-12)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert few_rows.faster_one_token(layer.experts, x_1D, routing) is None


def test_a_counter_sees_what_runs_and_changes_nothing(monkeypatch):
    """The same bits with and without a FLOP counter, which sees NumPy's products and a block's extra rows, too."""
    take(monkeypatch)
    torch.manual_seed(0)
    layer = small_moe().blocks[0].ffn
    per_row = 2 * layer.experts.w_up_EFD[0].numel() * 3
    for tokens in (1, 5, 200):
        x_ND = torch.randn(tokens, 256)
        with torch.no_grad():
            plain_ND, routing = layer(x_ND)
            with FlopCounterMode(display=False) as counter:
                watched_ND, _ = layer(x_ND)
        assert torch.equal(plain_ND, watched_ND)
        found = counter.get_total_flops() - 2 * tokens * layer.router.weight.numel()
        blocks = expert_by_expert._blocks(torch.bincount(routing.expert_ids_NK.flatten(), minlength=4).tolist())
        rows = sum(block.stop - block.start for _, _, block, _ in blocks) if tokens == 200 else 2 * tokens
        assert found == per_row * rows


def test_checkpointed_blocks_have_the_same_gradients(onednn):
    torch.manual_seed(0)
    model = small_moe().train()
    ids_BT = torch.randint(64, (4, 33))
    found = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model.objective(model(ids_BT[:, :-1], ids_BT[:, 1:])).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert_close(*found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_in_chunks_is_cross_entropy(bias, chunk, dtype, onednn, monkeypatch):
    monkeypatch.setattr("upcycling.core.model.CHUNK_LOGITS", 300 * chunk)
    torch.manual_seed(0)
    x, weight = torch.randn(23, 256, dtype=dtype), torch.randn(300, 256, dtype=dtype) / 16
    wanted = [t.requires_grad_() for t in ([x, weight, torch.randn(300, dtype=dtype)] if bias else [x, weight])]
    targets = torch.randint(300, (23,))
    targets[[0, 9, 22]] = IGNORE
    bias_V = wanted[2] if bias else None
    ours = loss_in_chunks(x, SimpleNamespace(weight=weight, bias=bias_V), targets)
    theirs = F.cross_entropy(F.linear(x, weight, bias_V), targets, ignore_index=IGNORE)
    relative = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close([ours, *gradients(3 * ours, *wanted)], [theirs, *gradients(3 * theirs, *wanted)], relative)


def test_a_large_vocabulary_never_holds_all_logits(monkeypatch):
    """The largest tensor of a training step is a chunk of the logits, not all of them."""
    monkeypatch.setattr("upcycling.core.model.MANY_LOGITS", 2**16)
    monkeypatch.setattr("upcycling.core.model.CHUNK_LOGITS", 2**14)
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig.smol(vocab_size=4096, d_model=8, n_layers=1, n_heads=1, d_ff=8, seq_len=32))
    ids_BT = torch.randint(4096, (4, 33))
    tokens_BT, targets_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(max((t.numel() for t in [result] if isinstance(t, torch.Tensor)), default=0))
            return result

    with Watch():
        output = model(tokens_BT, targets_BT)
        model.objective(output).backward()
    assert output.logits_BTV is None and max(largest) == 4096 * 8 < 128 * 4096
    chunked = [parameter.grad.clone() for parameter in model.parameters()]
    monkeypatch.setattr("upcycling.core.model.MANY_LOGITS", 2**26)
    model.zero_grad()
    whole = model(tokens_BT, targets_BT)
    whole.loss.backward()
    assert whole.logits_BTV.shape == (4, 32, 4096)
    assert_close([output.loss.detach()], [whole.loss.detach()])
    assert_close(chunked, [parameter.grad for parameter in model.parameters()], 5e-6)
    assert model(tokens_BT).logits_BTV is not None


def test_the_loss_in_chunks_under_autocast():
    torch.manual_seed(0)
    x, weight = torch.randn(40, 64, requires_grad=True), (torch.randn(96, 64) / 8).requires_grad_()
    targets = torch.randint(96, (40,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_in_chunks(x, SimpleNamespace(weight=weight, bias=None), targets)
    loss.backward()
    exact = F.cross_entropy(F.linear(x, weight), targets)
    assert loss.dtype == torch.float32 and x.grad.dtype == weight.grad.dtype == torch.float32
    assert_close([loss.detach()], [exact.detach()], 1e-2)
    assert_close([x.grad, weight.grad], gradients(exact, x, weight), 2e-2)


@pytest.mark.parametrize("moe_config", [None, MoEConfig(num_experts=4, top_k=2)], ids=["dense", "moe"])
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "model"])
def test_torch_compile_keeps_values_and_gradients(moe_config, blocks, onednn):
    """Traced by dynamo and AOT autograd, without the step that needs a C++ compiler."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DecoderLM(replace(small_moe().config, moe=moe_config))
    compiled = DecoderLM(model.config)
    compiled.load_state_dict(model.state_dict())
    for part in compiled.blocks if blocks else [compiled]:
        part.compile(backend="aot_eager")
    ids_BT = torch.randint(64, (2, 33))
    results = []
    for each in (compiled, model):
        output = each(ids_BT[:, :-1], ids_BT[:, 1:])
        each.objective(output).backward()
        results.append([output.logits_BTV.detach(), *(parameter.grad for parameter in each.parameters())])
    assert_close(*results, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
