"""The native engine: the oracle's completions, whatever the family, the batch or the budget."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast

from fastrl.errors import InputError, NotFiniteError
from fastrl.policy import Policy
from fastrl.rollout import Sampling, make_engine
from fastrl.rollout.graphed import GraphedDecoder
from fastrl.rollout.native import NativeEngine
from fastrl.rollout.room import GIB
from fastrl.rollout.stopping import StopStrings
from fastrl.types import Example, Prompts
from tests.helpers import random_ids, tiny_model, tiny_policy
from tests.test_families import FAMILIES

HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "olmo_hybrid": {
        "num_key_value_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "qwen3_5_text": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip
LENGTHS = [5, 1, 9, 9, 30]
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 1.3},
    "truncated": {"top_p": 0.8, "top_k": 40, "min_p": 0.01},
    "penalised": {"repetition_penalty": 1.4, "temperature": 0.8},
    "stopped": {"stop_strings": ("1", " is")},
}


def prompts_of(lengths, seed=0, vocab_size=250):
    ids = random_ids(lengths, seed=seed, vocab_size=vocab_size)
    return Prompts(tuple(ids), tuple(Example(prompt="x") for _ in ids))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def many_ends(policy):
    """A policy whose completions end early and late: one token in twelve is an end."""
    policy.eos_token_ids = list(range(0, 300, 12))
    return policy


@pytest.fixture(scope="module")
def policy():
    return many_ends(tiny_policy())


def assert_same(ours, theirs, *, atol=2e-5):
    """The same completions, drawn from the same distributions.

    A number may fall between the two roundings of a cumulated probability: a row in ten may part
    there, if the distributions still agree at the token that differs.
    """
    num_parted = 0
    for b, pair in enumerate(zip(ours.completion_ids, theirs.completion_ids, strict=True)):
        num = min(map(len, pair))
        same = int((pair[0][:num] == pair[1][:num]).int().cumprod(0).sum())
        parted = same < max(map(len, pair))
        num_parted += parted
        for name in ("rollout_logps", "rollout_entropies", "processed_logps"):
            if getattr(ours, name) is None:
                assert getattr(theirs, name) is None
                continue
            until = same + (parted and name == "rollout_entropies")
            values = (getattr(rollouts, name)[b][:until] for rollouts in (ours, theirs))
            torch.testing.assert_close(
                *values, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert parted or ours.finished[b] == theirs.finished[b]
    assert num_parted <= len(ours.completion_ids) // 10


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_completions_are_those_of_generate(policy, settings):
    sampling = Sampling(4, 40, **settings)
    ours, theirs = (
        make_engine(name, policy).generate(prompts_of(LENGTHS), sampling, generator())
        for name in ("native", "generate")
    )
    assert_same(ours, theirs)
    assert int(ours.finished.sum()) > 0
    assert len(set(ours.lengths.tolist())) > 3


@pytest.mark.parametrize("model_type", sorted({**FAMILIES, **HYBRIDS}))
def test_every_family_decodes_as_generate_does(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    policy = tiny_policy()
    fields = {**FAMILIES, **HYBRIDS}[model_type]
    ids = {"pad_token_id": policy.tokenizer.pad_token_id, "eos_token_id": 1}
    model = tiny_model(
        model_type, vocab_size=len(policy.tokenizer), dtype=torch.float32, **ids, **fields
    )
    policy = many_ends(Policy(model, policy.tokenizer))
    sampling = Sampling(3, 24)  # longer than any window
    # Of one length: the oracle pads, and states of convolutions remember padding.
    prompts = prompts_of([9, 9, 9] if model_type in HYBRIDS else LENGTHS)
    ours = make_engine("native", policy).generate(prompts, sampling, generator())
    theirs = make_engine("generate", policy).generate(prompts, sampling, generator())
    assert_same(ours, theirs, atol=2e-4)


class Steady(NativeEngine):
    """Steps as a graph would hold them, run one operation after the other."""

    def _decoder(self, max_new_tokens):
        return GraphedDecoder(self.policy, max_new_tokens, capture=False)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("budget", [None, 3e-4])
def test_steps_of_constant_shape_draw_the_same(model_type, budget):
    fields = {"model_type": model_type, **FAMILIES[model_type]}
    policy = many_ends(tiny_policy(**fields))
    sampling, prompts = Sampling(4, 30), prompts_of(LENGTHS)
    theirs = NativeEngine(policy).generate(prompts, sampling, generator())
    ours = Steady(policy, kv_cache_gib=budget).generate(prompts, sampling, generator())
    assert_same(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_gpu_samples_from_what_a_forward_pass_says(cuda_graphs):
    policy = tiny_policy(dtype=torch.float32)
    policy = many_ends(Policy(policy.model.cuda(), policy.tokenizer))
    engine = make_engine("native", policy, {"cuda_graphs": cuda_graphs})
    made = torch.Generator("cuda").manual_seed(0)
    rollouts = engine.generate(prompts_of(LENGTHS), Sampling(4, 40), made)
    for b, completion in enumerate(rollouts.completion_ids):
        ids = torch.cat([rollouts.prompts.token_ids[b // 4], completion]).cuda()
        with torch.no_grad():
            logits = policy.model(input_ids=ids[None]).logits[0].double().cpu()
        table = logits[-len(completion) - 1 : -1].log_softmax(-1)
        expected = table.gather(1, completion[:, None])[:, 0].float()
        torch.testing.assert_close(rollouts.rollout_logps[b], expected, rtol=0, atol=5e-3)


def test_hybrids_take_prompts_of_any_length():
    """Each alone, or of several lengths in one call: no padding is ever seen by a state."""
    policy = many_ends(tiny_policy(model_type="lfm2", **HYBRIDS["lfm2"]))
    engine, sampling = make_engine("native", policy), Sampling(2, 12)
    prompts = prompts_of(LENGTHS)
    together = engine.generate(prompts, sampling, generator())
    for p in range(len(prompts)):
        part = Prompts(prompts.token_ids[p : p + 1], prompts.examples[p : p + 1])
        alone = engine.generate(part, sampling, generator())
        for g in range(2):
            assert torch.equal(alone.completion_ids[g], together.completion_ids[2 * p + g])


def test_recorded_logps_are_those_of_a_plain_forward(policy):
    sampling = Sampling(2, 12, temperature=0.7, top_k=5)
    rollouts = make_engine("native", policy).generate(prompts_of([5, 9]), sampling, generator())
    for b, completion in enumerate(rollouts.completion_ids):
        prompt = rollouts.prompts.token_ids[b // 2]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        table = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        raw = table.gather(1, completion[:, None])[:, 0]
        torch.testing.assert_close(rollouts.rollout_logps[b], raw, rtol=0, atol=2e-5)
        processed = raw - table.topk(5).values.logsumexp(-1)
        torch.testing.assert_close(rollouts.processed_logps[b], processed, rtol=0, atol=2e-5)
        entropies = -(table.exp() * table).sum(-1)
        torch.testing.assert_close(rollouts.rollout_entropies[b], entropies, rtol=0, atol=2e-5)


def test_a_completion_does_not_depend_on_its_company(policy):
    engine, sampling = make_engine("native", policy), Sampling(4, 30)
    prompts = prompts_of([7, 3, 7, 20])
    together = engine.generate(prompts, sampling, generator())
    for p in (3, 0):
        part = Prompts(prompts.token_ids[p : p + 1], prompts.examples[p : p + 1])
        fewer = engine.generate(part, Sampling(2, 30), generator())
        for g in range(2):
            assert torch.equal(fewer.completion_ids[g], together.completion_ids[4 * p + g])


def test_equal_prompts_are_encoded_once_and_answered_differently(policy, monkeypatch):
    ids = random_ids([6], vocab_size=250)[0]
    prompts = Prompts((ids, ids, ids), tuple(Example(prompt="x") for _ in range(3)))
    engine = make_engine("native", policy)
    engine.generate(prompts, Sampling(2, 20), generator())
    of_equal = engine.peak_kv_bytes
    rollouts = engine.generate(prompts_of([6]), Sampling(6, 20), generator())
    assert of_equal == engine.peak_kv_bytes
    assert len({tuple(ids.tolist()) for ids in rollouts.completion_ids}) == 6


def test_prompts_wait_for_room_and_get_the_same_completions(policy):
    prompts, sampling = prompts_of([40, 3, 9, 30, 12, 12, 2]), Sampling(4, 30)
    free = make_engine("native", policy)
    expected = free.generate(prompts, sampling, generator())
    smallest = (40 + 4 * 30) * 2 * 2 * 2 * 8 * 4  # k and v of 2 layers, 2 heads of 8 floats
    for budget in (smallest, 2 * smallest):
        engine = make_engine("native", policy, {"kv_cache_gib": budget / GIB})
        order: dict[int, torch.Tensor] = {}
        rollouts = engine.generate(prompts, sampling, generator(), order.__setitem__)
        assert_same(rollouts, expected)
        assert engine.peak_kv_bytes <= budget < free.peak_kv_bytes
        if budget == smallest:
            assert set(list(order)[:4]) == set(range(4)), "the longest prompt goes first"
    with pytest.raises(InputError, match=r"at least 3\.8\d+e-05 GiB"):
        make_engine("native", policy, {"kv_cache_gib": (smallest - 1) / GIB}).generate(
            prompts, sampling, generator()
        )


@pytest.mark.parametrize("engine_class", [NativeEngine, Steady])
def test_completions_that_outgrow_the_budget_start_again_from_what_they_have(engine_class):
    """Up to 200 tokens, where as much room as for two of the largest groups lets many start."""
    policy = tiny_policy(max_position_embeddings=512)
    policy.eos_token_ids = list(range(0, 300, 100))  # one token in a hundred: most become long
    prompts, sampling = prompts_of([40, 3, 9, 30, 12, 12, 2]), Sampling(4, 200)
    expected = NativeEngine(policy).generate(prompts, sampling, generator())
    largest = (40 + 4 * 200) * 2 * 2 * 2 * 8 * 4
    for budget in (largest, 2 * largest):
        ended = []
        engine = engine_class(policy, kv_cache_gib=budget / GIB)
        rollouts = engine.generate(
            prompts, sampling, generator(), lambda b, ids, ended=ended: ended.append(b)
        )
        assert_same(rollouts, expected)
        assert engine.num_restarts > 0
        assert engine.peak_kv_bytes <= budget
        assert sorted(ended) == list(range(28))


def test_memory_grows_with_completions(policy):
    """Not with what they might become."""
    engine = make_engine("native", tiny_policy(max_position_embeddings=4096))
    engine.policy.eos_token_ids = list(range(300))  # every first token is an end
    engine.generate(prompts_of([5]), Sampling(4, 4000), generator())
    assert engine.peak_kv_bytes <= (5 + 4 * 64) * 2 * 2 * 2 * 8 * 4


def test_equal_prompts_that_find_no_room_together_wait_for_each_other(policy):
    ids = random_ids([6], vocab_size=250)[0]
    prompts = Prompts((ids, ids, ids), tuple(Example(prompt="x") for _ in range(3)))
    expected = make_engine("native", policy).generate(prompts, Sampling(2, 20), generator())
    budget = (6 + 3 * 20) * 2 * 2 * 2 * 8 * 4 / GIB  # three completions of six
    engine = make_engine("native", policy, {"kv_cache_gib": budget})
    assert_same(engine.generate(prompts, Sampling(2, 20), generator()), expected)
    assert engine.peak_kv_bytes <= budget * GIB
    engine.advance(prompts, Sampling(2, 20), generator(), started=expected)  # nothing to do


def test_keys_and_values_take_less_than_half_of_what_generate_keeps(policy):
    """512 tokens of prompt, 128 of completion, 8 completions: 0.3x."""
    policy = tiny_policy(max_position_embeddings=1024)
    policy.eos_token_ids = []
    engine = NativeEngine(policy)
    engine.generate(prompts_of([512]), Sampling(8, 128), generator())
    kept = 8 * (512 + 128) * 2 * 2 * 2 * 8 * 4
    assert engine.peak_kv_bytes <= 0.5 * kept


def test_each_completion_is_handed_out_once_and_as_it_ends(policy):
    for name in ("native", "generate"):
        found = []
        rollouts = make_engine(name, policy).generate(
            prompts_of(LENGTHS), Sampling(3, 25), generator(),
            lambda b, ids, found=found: found.append((b, ids)),
        )  # fmt: skip
        assert sorted(b for b, _ in found) == list(range(15))
        assert [b for b, _ in found] != list(range(15)), "shorter completions come earlier"
        for b, ids in found:
            assert torch.equal(ids, rollouts.completion_ids[b])


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(policy):
    policy = tiny_policy()
    rollouts = make_engine("native", policy).generate(
        prompts_of(LENGTHS), Sampling(8, 60, stop_strings=("7", "What")), generator()
    )
    texts = [policy.tokenizer.decode(ids) for ids in rollouts.completion_ids]
    stopped = [
        text
        for text, done, ids in zip(texts, rollouts.finished, rollouts.completion_ids, strict=True)
        if done and int(ids[-1]) not in policy.eos_token_ids
    ]
    assert len(stopped) > 10
    for ids in rollouts.completion_ids:
        before = policy.tokenizer.decode(ids[:-1])
        assert "7" not in before
        assert "What" not in before
    assert all("7" in text or "What" in text for text in stopped)


def test_what_cannot_be_done_is_refused(policy):
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")), unk_token="[UNK]"
    )
    with pytest.raises(InputError, match=r"would never match the tokens"):
        StopStrings(words, ["a", "snow"])
    with pytest.raises(InputError, match=r"kv_cache_gib must be positive"):
        make_engine("native", policy, {"kv_cache_gib": 0})
    with pytest.raises(InputError, match=r"engine_args do not fit engine 'native'.*cache"):
        make_engine("native", policy, {"cache": 1})
    with pytest.raises(InputError, match=r"120 tokens and .* are 150 tokens, .* 128 positions"):
        make_engine("native", policy).generate(prompts_of([3, 120]), Sampling(1, 30), generator())
    with pytest.raises(InputError, match=r"cuda_graphs needs .* on a GPU, got .* on cpu"):
        make_engine("native", policy, {"cuda_graphs": True})
    hybrid = tiny_policy(model_type="lfm2", **HYBRIDS["lfm2"])
    with pytest.raises(InputError, match=r"keeps other states too"):
        make_engine("native", hybrid, {"kv_cache_gib": 1.0})


def test_the_model_is_left_as_it_was_also_after_an_error(policy):
    model = tiny_policy().model
    policy = Policy(model, policy.tokenizer)
    model.train()
    before = model.config._attn_implementation
    engine = make_engine("native", policy)
    engine.generate(prompts_of([4]), Sampling(2, 3), generator())
    assert model.training
    assert model.config._attn_implementation == before
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="lower the learning rate"):
        engine.generate(prompts_of([4]), Sampling(2, 3), generator())
    assert model.training
    assert model.config._attn_implementation == before


def test_new_weights_are_sampled_from_at_once(policy):
    policy = tiny_policy()
    engine, sampling = make_engine("native", policy), Sampling(2, 6)
    first = engine.generate(prompts_of([4]), sampling, generator())
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight.mul_(-1)
    second = engine.generate(prompts_of([4]), sampling, generator())
    theirs = make_engine("generate", policy).generate(prompts_of([4]), sampling, generator())
    assert_same(second, theirs)
    assert not torch.equal(first.rollout_logps[0][:1], second.rollout_logps[0][:1])


def test_an_adapter_is_sampled_with(policy):
    peft = pytest.importorskip("peft")
    plain = tiny_policy()
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = Policy(peft.get_peft_model(plain.model, config), plain.tokenizer)
    sampling = Sampling(3, 10)
    ours = make_engine("native", adapted).generate(prompts_of(LENGTHS), sampling, generator())
    theirs = make_engine("generate", adapted).generate(prompts_of(LENGTHS), sampling, generator())
    assert_same(ours, theirs)
    with adapted.model.disable_adapter():
        off = make_engine("native", adapted).generate(prompts_of(LENGTHS), sampling, generator())
    assert not torch.equal(off.rollout_logps[0][:1], ours.rollout_logps[0][:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_folded_and_taken_out_to_the_bit(policy, dtype):
    peft = pytest.importorskip("peft")
    plain = tiny_policy(dtype=dtype)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = many_ends(Policy(peft.get_peft_model(plain.model, config), plain.tokenizer))
    before = {name: x.clone() for name, x in adapted.model.state_dict().items()}
    sampling, rollouts = Sampling(3, 10), {}
    for fold in (True, False):
        engine = make_engine("native", adapted, {"fold_adapters": fold})
        rollouts[fold] = engine.generate(prompts_of(LENGTHS), sampling, generator())
    assert all(torch.equal(x, before[name]) for name, x in adapted.model.state_dict().items())
    assert not any(getattr(m, "merged", False) for m in adapted.model.modules())
    if dtype == torch.float32:
        assert_same(rollouts[True], rollouts[False], atol=2e-4)
    with adapted.model.disable_adapter():
        off = make_engine("native", adapted, {"fold_adapters": True})
        off = off.generate(prompts_of(LENGTHS), sampling, generator())
        theirs = make_engine("generate", adapted)
        theirs = theirs.generate(prompts_of(LENGTHS), sampling, generator())
    if dtype == torch.float32:
        assert_same(off, theirs)


def test_a_weight_that_would_round_an_adapter_is_not_folded(policy):
    peft = pytest.importorskip("peft")
    plain = tiny_policy()
    adapted = Policy(
        peft.get_peft_model(plain.model, peft.LoraConfig(r=2, target_modules=["q_proj"])),
        plain.tokenizer,
    )
    base = adapted.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    base.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    engine = make_engine("native", adapted, {"fold_adapters": True})
    with pytest.raises(
        InputError, match=r"plain floating-point weights, got Parameter of torch.uint8"
    ):
        engine.generate(prompts_of([3]), Sampling(1, 2), generator())


def test_weights_of_four_bits_are_sampled_from(policy):
    bnb = pytest.importorskip("bitsandbytes")
    frozen = tiny_policy(hidden_size=64, intermediate_size=128, head_dim=16)
    for layer in frozen.model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    quantised = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, bias=False,
                        compute_dtype=torch.float32, quant_type="nf4",
                    )  # fmt: skip
                    quantised.weight = bnb.nn.Params4bit(
                        linear.weight.data.clone(), requires_grad=False, quant_type="nf4"
                    )
                    setattr(block, name, quantised.to("cpu"))
    frozen = many_ends(frozen)
    ours, theirs = (
        make_engine(name, frozen).generate(prompts_of(LENGTHS), Sampling(4, 30), generator())
        for name in ("native", "generate")
    )
    assert_same(ours, theirs, atol=1e-3)


def test_bf16_arithmetic_samples_too(policy):
    policy = Policy(tiny_policy().model, policy.tokenizer, bf16=True)
    rollouts = make_engine("native", policy).generate(
        prompts_of(LENGTHS), Sampling(2, 8), generator()
    )
    exact = make_engine("native", tiny_policy()).generate(
        prompts_of(LENGTHS), Sampling(2, 1), generator()
    )
    same = [
        abs(float(a[0] - b[0])) < 0.2
        for a, b, x, y in zip(
            rollouts.rollout_logps, exact.rollout_logps, rollouts.completion_ids,
            exact.completion_ids, strict=True,
        )
        if x[0] == y[0]
    ]  # fmt: skip
    assert len(same) > 5
    assert all(same)


def test_a_budget_cuts_the_longest_completions_which_then_go_on(policy):
    """With the same generator and weights the parts make up the completions of one call."""
    engine, sampling = make_engine("native", policy), Sampling(4, 40, repetition_penalty=1.2)
    prompts = prompts_of(LENGTHS)
    whole = engine.generate(prompts, sampling, generator())
    started, calls, ended = None, 0, []
    while started is None or bool((~started.finished & (started.lengths < 40)).any()):
        started = engine.advance(
            prompts, sampling, generator(), started=started, max_tokens=60,
            on_completion=lambda b, ids: ended.append(b),
        )  # fmt: skip
        calls += 1
        going = ~started.finished & (started.lengths < 40)
        assert (started.lengths[going] >= started.lengths.max() - 20).all() or calls > 1
    assert calls > 3
    assert_same(started, whole)
    assert sorted(ended) == list(range(20))
    assert engine.advance(prompts, sampling, generator(), started=whole).lengths.equal(
        whole.lengths
    )
