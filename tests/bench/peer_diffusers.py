"""Makes, merges and runs adapters with diffusers, peft and LyCORIS, in an environment of its own. Started by adapter_peers.py.

`python peer_diffusers.py FOLDER` makes the models `sd1` and `sdxl` as diffusers folders, of the real structure and narrow, and for every case

    CASE.safetensors      the adapter, in float16
    CASE.32, CASE.64      the tensors that their own code changes when it merges it, in float32 and in float64 (where it can)
    CASE.out              what the merged model makes of fixed inputs, and what it made of them before

`python peer_diffusers.py FOLDER --ours` lets the models make of the same inputs what they make with the weights in CASE.ours: CASE.ours.out.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft.tuners.boft.layer as butterflies
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from lycoris import create_lycoris
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

Models = dict[str, nn.Module]  # by the folder of the component
Tensors = dict[str, Tensor]

RANK, WIDTH, WORDS = 4, 48, 97
LINEAR = "to_q|to_k|to_v|to_out.0|proj_in|proj_out|ff.net.0.proj|ff.net.2|time_emb_proj|linear_1|linear_2"
CONVOLUTIONS = "conv1|conv2|conv_shortcut|conv|conv_in|conv_out"
ALL = f"{LINEAR}|{CONVOLUTIONS}".split("|")
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

SINGLE = ("lycoris_oft", "lycoris_oft_limited", "lycoris_boft")  # rotations are found in float32 there, whatever is asked for

CASES: dict[str, Callable[[Path, torch.dtype], Models]] = {}


def case(make: Callable[[Path, torch.dtype], Models]) -> Callable[[Path, torch.dtype], Models]:
    """Collect what writes an adapter, with its path without the suffix, and returns models of a dtype that it is merged into."""
    CASES[make.__name__] = make
    return make


@functools.cache
def configured(kind: str) -> Models:
    """Make models of SD 1's and SDXL's structure, with random weights: all blocks and layers, few channels."""
    torch.manual_seed(1)
    text = {"hidden_size": WIDTH, "num_attention_heads": 4, "vocab_size": WORDS, "max_position_embeddings": 77, "projection_dim": WIDTH}
    clip_l = CLIPTextModel(CLIPTextConfig(**text, intermediate_size=96, num_hidden_layers=12, eos_token_id=WORDS - 1))
    if kind == "sd1":
        unet = UNet2DConditionModel(sample_size=16, block_out_channels=(32, 64, 96, 96), cross_attention_dim=WIDTH, attention_head_dim=8)
        return {"unet": unet, "text_encoder": clip_l}
    clip_g = CLIPTextModelWithProjection(CLIPTextConfig(**text, intermediate_size=64, num_hidden_layers=32, eos_token_id=WORDS - 1))
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=WIDTH + 6 * 16,
    )
    return {"unet": unet, "text_encoder": clip_l, "text_encoder_2": clip_g}


def models(kind: str) -> Models:
    """Return fresh models, all alike."""
    return {name: copy.deepcopy(module).eval().requires_grad_(requires_grad=False) for name, module in configured(kind).items()}


def pipeline(kind: str, held: Models) -> StableDiffusionPipeline:
    """Make a pipeline of models, without what adapters do not change."""
    rest = {
        "vae": None,
        "tokenizer": None,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        "feature_extractor": None,
    }
    if kind == "sdxl":
        return StableDiffusionXLPipeline(**held, **rest, tokenizer_2=None, add_watermarker=False)
    return StableDiffusionPipeline(**held, **rest, safety_checker=None, requires_safety_checker=False)


def tensors_of(held: Models) -> Tensors:
    """List the tensors of models as diffusers folders have them."""
    return {f"{component}.{name}": tensor for component, module in held.items() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def run(held: Models, kind: str) -> Tensor:
    """Make of fixed inputs what the models make of them."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    words = torch.randint(0, WORDS - 1, (2, 77), generator=generator)
    words[:, -1] = WORDS - 1
    if kind == "sd1":
        context, more = held["text_encoder"](words).last_hidden_state, None
    else:
        first, second = (held[name](words, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2"))
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        more = {"text_embeds": second.text_embeds, "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]] * 2)}
    return held["unet"](latents, torch.tensor([3, 700]), context, added_cond_kwargs=more).sample


@torch.no_grad()
def fill(parameters: Iterator[tuple[str, nn.Parameter]]) -> None:
    """Fill an adapter with random numbers that float16 can hold, about as large as trained ones."""
    generator = torch.Generator().manual_seed(11)
    sizes = {"lora_B": 0.04, "lora_up": 0.04, "oft": 0.1, "boft_R": 0.2, "a1": 0.1, "a2": 0.1, "b1": 0.1, "b2": 0.1, "bias": 0.02}
    for name, parameter in parameters:
        around = next((parameter.data for word in ("magnitude", "dora_scale", "rescale", "ia3_l") if word in name), 0)
        relative = 0.05 if isinstance(around, Tensor) or ".w_norm" in name else next((size for word, size in sizes.items() if word in name), 0.2)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * relative
        parameter.copy_((around + noise * (around if isinstance(around, Tensor) else 1)).to(torch.float16))


def adapted(module: nn.Module, config: PeftConfig) -> nn.Module:
    """Wrap a model in an adapter with random numbers."""
    wrapped = get_peft_model(module, config)
    fill((name, parameter) for name, parameter in wrapped.named_parameters() if parameter.requires_grad)
    return wrapped


def save(path: Path, tensors: Tensors) -> None:
    """Write an adapter in float16, but for tensors that it cannot hold."""
    kept = {}
    for name, tensor in tensors.items():
        half = tensor.detach().to(torch.float16 if tensor.is_floating_point() else tensor.dtype)
        kept[name] = (half if torch.equal(half.to(tensor.dtype), tensor) else tensor.detach()).contiguous()
    save_file(kept, path.with_suffix(".safetensors"), metadata={"format": "pt"})


# LoRA: written as trainers of diffusers write it, read back and fused by a pipeline.


def lora_config(names: list[str], **more: object) -> LoraConfig:
    """Configure a LoRA of modules whose names end so."""
    return LoraConfig(**{"r": RANK, "lora_alpha": RANK, "target_modules": names, "init_lora_weights": "gaussian"} | more)


def trained(kind: str, names: list[str] = ALL, *, text: bool = True, **more: object) -> Models:
    """Make models with a LoRA each, as a trainer has them."""
    held = models(kind)
    for component, module in held.items():
        if component == "unet" or text:
            module.add_adapter(lora_config(names if component == "unet" else TEXT, **more))
            fill((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
    return {component: module for component, module in held.items() if hasattr(module, "peft_config")}


def write_as_diffusers(path: Path, kind: str, held: Models, *, is_renamed: bool = False) -> None:
    """Save as the training scripts of diffusers do: renamed, when there were no settings in headers, and now with settings.

    The renaming leaves some modules `lora_A` and `lora_B`; a UNet's file that has both spellings is then read by diffusers in part, without a word,
    so only attention is trained then.
    """
    layers = {}
    for component, module in held.items():
        tensors = get_peft_model_state_dict(module)
        tensors = convert_state_dict_to_diffusers(tensors) if is_renamed else tensors
        layers[f"{component}_lora_layers"] = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    metadata = {} if is_renamed else _collate_lora_metadata(held)
    saver = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    saver.save_lora_weights(path.parent, **layers, weight_name=f"{path.name}.safetensors", **metadata)


def fused(path: Path, kind: str, dtype: torch.dtype) -> Models:
    """Read a file into a pipeline and fuse it."""
    held = models(kind)
    pipe = pipeline(kind, held)
    pipe.load_lora_weights(str(path.parent), weight_name=f"{path.name}.safetensors", low_cpu_mem_usage=False)
    for module in held.values():
        module.to(dtype)
    pipe.fuse_lora(components=list(held))
    pipe.unload_lora_weights()
    return held


@case
def lora(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoRA of attention whose alpha is its rank, so that nobody needs to say it."""
    write_as_diffusers(path, "sd1", trained("sd1", LINEAR.split("|")[:4]), is_renamed=True)
    return fused(path, "sd1", dtype)


@case
def lora_settings(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoRA whose alpha is in the header, and not the same for all modules."""
    more = {"lora_alpha": 3, "rank_pattern": {"to_q": 8, "conv1": 2}, "alpha_pattern": {"attn2.to_k": 1, "conv1": 5}}
    write_as_diffusers(path, "sd1", trained("sd1", **more))
    return fused(path, "sd1", dtype)


@case
def lora_rslora(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoRA that is as strong as alpha over the root of its rank."""
    write_as_diffusers(path, "sd1", trained("sd1", lora_alpha=3, use_rslora=True))
    return fused(path, "sd1", dtype)


@case
def lora_bias(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoRA that changes biases."""
    write_as_diffusers(path, "sd1", trained("sd1", ["ff.net.2", "conv1"], text=False, lora_bias=True, init_lora_weights=True, lora_alpha=3))
    return fused(path, "sd1", dtype)


@case
def lora_dora(path: Path, dtype: torch.dtype) -> Models:
    """Make a DoRA of a UNet's linear layers; of text encoders, the pipeline does not read the lengths."""
    names = [name for name in LINEAR.split("|") if not name.startswith("proj_")]
    write_as_diffusers(path, "sd1", trained("sd1", names, text=False, lora_alpha=3, use_dora=True))
    return fused(path, "sd1", dtype)


@case
def lora_dora_conv(path: Path, dtype: torch.dtype) -> Models:
    """Make a DoRA of convolutions."""
    write_as_diffusers(path, "sd1", trained("sd1", ["conv1"], text=False, lora_alpha=3, use_dora=True))
    return fused(path, "sd1", dtype)


@case
def lora_sdxl(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoRA of SDXL's UNet and both its text encoders, one of which checkpoints keep under other names, q, k and v in one tensor."""
    write_as_diffusers(path, "sdxl", trained("sdxl", lora_alpha=3))
    return fused(path, "sdxl", dtype)


@case
def lora_model(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoRA with a UNet's own `save_lora_adapter`."""
    held = trained("sd1", text=False, lora_alpha=3)
    held["unet"].save_lora_adapter(path.parent, weight_name=f"{path.name}.safetensors")
    stored = models("sd1")
    stored["unet"].load_lora_adapter(str(path.parent), weight_name=f"{path.name}.safetensors", prefix=None, low_cpu_mem_usage=False)
    stored["unet"].to(dtype).fuse_lora()
    stored["unet"].unload_lora()
    return stored


def kohya(path: Path, kind: str, dtype: torch.dtype, names: list[str], alpha: float | None = None) -> Models:
    """Rename a LoRA with diffusers' own converter, which knows no alpha but the rank, a whole number; say another."""
    named = {f"{component}.{name}": tensor for component, m in trained(kind, names).items() for name, tensor in get_peft_model_state_dict(m).items()}
    tensors = convert_state_dict_to_kohya(named)
    save(path, {name: torch.tensor(alpha) if alpha and name.endswith(".alpha") else tensor for name, tensor in tensors.items()})
    return fused(path, kind, dtype)


@case
def lora_kohya(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoRA under kohya's names, of SD 1."""
    return kohya(path, "sd1", dtype, ALL, 1.5)


@case
def lora_kohya_sdxl(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoRA under kohya's names, of SDXL; diffusers reads no `add_embedding` of its own converter's."""
    return kohya(path, "sdxl", dtype, [name for name in ALL if not name.startswith("linear_")])


@case
def lora_peft(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoRA as peft saves it, with its own prefix."""
    held = models("sd1")
    wrapped = adapted(held["unet"], lora_config(ALL))
    wrapped.save_pretrained(path.parent / f"{path.name}.peft")
    save(path, load_file(path.parent / f"{path.name}.peft" / "adapter_model.safetensors"))
    return held | {"unet": wrapped.to(dtype).merge_and_unload()}


# Other kinds of peft: no file of theirs is for diffusion models, so factors are saved under the names that LyCORIS and kohya give them.


def as_lycoris(wrapped: nn.Module, alpha: float) -> Tensors:
    """Name the factors of LoHa and LoKr as kohya's trainer with LyCORIS does; where LoKr has both sides whole, nobody reads an alpha there."""
    tensors: Tensors = {}
    for name, tensor in get_peft_model_state_dict(wrapped).items():
        module, _, factor = name.removeprefix("base_model.model.").rpartition(".")
        flat = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{flat}.{factor}": tensor, f"{flat}.alpha": torch.tensor(alpha)}
    for name in [name for name in tensors if name.endswith(".lokr_w1") and f"{name[:-1]}2" in tensors]:
        tensors[name] = tensors[name] * (alpha / RANK)
    return tensors


def merged(path: Path, dtype: torch.dtype, config: PeftConfig, alpha: float) -> Models:
    """Merge LoHa or LoKr."""
    held = models("sd1")
    wrapped = adapted(held["unet"], config)
    save(path, as_lycoris(wrapped, alpha))
    return held | {"unet": wrapped.to(dtype).merge_and_unload()}


@case
def loha(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoHa of everything."""
    return merged(path, dtype, LoHaConfig(r=RANK, alpha=2, target_modules=ALL), 2)


@case
def loha_core(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoHa whose convolutions have cores."""
    return merged(path, dtype, LoHaConfig(r=RANK, alpha=2, target_modules=ALL, use_effective_conv2d=True), 2)


@case
def lokr(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoKr, one side of which is whole, or both."""
    return merged(path, dtype, LoKrConfig(r=RANK, alpha=2, target_modules=ALL), 2)


@case
def lokr_both(path: Path, dtype: torch.dtype) -> Models:
    """Make a LoKr with both sides factored where they are large, and cores."""
    return merged(path, dtype, LoKrConfig(r=2, alpha=1, target_modules=ALL, decompose_both=True, decompose_factor=8, use_effective_conv2d=True), 1)


@case
def ia3(path: Path, dtype: torch.dtype) -> Models:
    """Make an IA³ of layers whose biases peft leaves alone: it stores the factor, LyCORIS what it is above 1."""
    held = models("sd1")
    inputs = ["ff.net.2", "conv1"]
    wrapped = adapted(held["unet"], IA3Config(target_modules=["to_k", "to_v", *inputs], feedforward_modules=inputs))
    tensors: Tensors = {}
    for name, tensor in get_peft_model_state_dict(wrapped).items():
        module = name.removeprefix("base_model.model.").removesuffix(".ia3_l")
        flat = f"lora_unet_{module.replace('.', '_')}"
        shape = (1, -1, 1, 1) if "conv" in module else (-1,)
        on_input = torch.tensor(int(module.endswith(tuple(inputs))), dtype=torch.uint8)
        tensors |= {f"{flat}.weight": (tensor - 1).reshape(shape), f"{flat}.on_input": on_input}
    save(path, tensors)
    return held | {"unet": wrapped.to(dtype).merge_and_unload()}


def rotated(path: Path, dtype: torch.dtype, config: PeftConfig, blocks_of: Callable[[nn.Module], Tensor]) -> Models:
    """Merge OFT or BOFT into the transposed layers: peft turns what goes into a layer, and LyCORIS and kohya what comes out of it."""
    held = models("sd1")
    layers = {name: module for name, module in held["unet"].named_modules() if name.endswith(("to_q", "to_k", "to_v", "conv1", "conv2"))}
    turned = nn.Module()
    for name, layer in layers.items():
        turned.add_module(name.replace(".", "_"), linear := nn.Linear(len(layer.weight), layer.weight[0].numel(), bias=False))
        linear.weight.data = layer.weight.data.flatten(1).t().contiguous()
    config.target_modules = [name for name, _ in turned.named_children()]
    wrapped = get_peft_model(turned, config)
    fill((name, parameter) for name, parameter in wrapped.named_parameters() if parameter.requires_grad and "boft_s" not in name)
    stored = {f"lora_unet_{name}.oft_blocks": blocks_of(module) for name, module in turned.named_children()}
    save(path, stored | {f"lora_unet_{name}.alpha": torch.tensor(0.0) for name, _ in turned.named_children()})
    done = wrapped.to(dtype).merge_and_unload()
    held["unet"].to(dtype)
    for name, layer in layers.items():
        layer.weight.data = done.get_submodule(name.replace(".", "_")).weight.data.t().reshape(layer.weight.shape).contiguous()
    return held


@case
def oft(path: Path, dtype: torch.dtype) -> Models:
    """Make an OFT: peft stores the triangle above the diagonal."""

    def blocks_of(module: nn.Module) -> Tensor:
        inner = module.oft_R["default"]
        blocks = torch.zeros(len(inner.weight), inner.block_size, inner.block_size)
        blocks[:, inner.rows, inner.cols] = inner.weight.data
        return blocks

    return rotated(path, dtype, OFTConfig(oft_block_size=8, r=0, use_cayley_neumann=False), blocks_of)


@case
def boft(path: Path, dtype: torch.dtype) -> Models:
    """Make a BOFT of two factors, the most for which peft's and LyCORIS's butterflies mix the same rows.

    peft stores the double of the opposite, and takes the rows of a block in another order.
    """
    size = 8
    order = torch.arange(size).view(2, -1).t().reshape(-1)
    butterflies.get_fbd_cuda = lambda: True  # otherwise there is no second factor; without its kernel, blocks are put into a matrix below
    butterflies.FastBlockDiag.apply = staticmethod(lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks]))

    def blocks_of(module: nn.Module) -> Tensor:
        return module.boft_R["default"].data[:, :, order][:, :, :, order] * -0.5

    return rotated(path, dtype, BOFTConfig(boft_block_size=size, boft_block_num=0, boft_n_butterfly_factor=2), blocks_of)


# LyCORIS's own files and its own code.


def stored(module: nn.Module) -> Tensors:
    """List what LyCORIS stores of a module; of plain differences, it thinks that they are added already."""
    if module.name != "full":
        return module.state_dict()
    return {"diff": module.weight.data} | ({} if module.bias is None else {"diff_b": module.bias.data})


def lycoris(path: Path, dtype: torch.dtype, algo: str, **more: object) -> Models:
    """Make an adapter of LyCORIS with random numbers, and merge it."""
    held = models("sd1")
    network = create_lycoris(held["unet"], 1.0, algo=algo, preset="full", **{"linear_dim": RANK, "linear_alpha": 3.0} | more)
    fill((name, parameter) for module in network.loras for name, parameter in module.named_parameters())
    save(path, {f"{module.lora_name}.{name}": tensor for module in network.loras for name, tensor in stored(module).items()})
    for module in network.loras:
        module.to(dtype)
    held["unet"].to(dtype)
    with torch.no_grad():
        for module in network.loras:
            module.merge_to(1.0)
    return held


def lycoris_case(name: str, algo: str, **more: object) -> None:
    """Collect a case of LyCORIS."""
    CASES[name] = lambda path, dtype: lycoris(path, dtype, algo, **more)


lycoris_case("lycoris_locon", "locon", use_tucker=True)
lycoris_case("lycoris_norm", "locon", train_norm=True)
lycoris_case("lycoris_dora_output", "locon", dora_wd=True, wd_on_output=True)
lycoris_case("lycoris_dora_input", "locon", dora_wd=True, wd_on_output=False)
# merge_to multiplies LoHa and LoKr by alpha / rank twice, which is 1 here; running a model with the adapter does so once.
lycoris_case("lycoris_loha", "loha", use_tucker=True, linear_alpha=RANK)
lycoris_case("lycoris_loha_dora", "loha", dora_wd=True, wd_on_output=False, linear_alpha=RANK)
lycoris_case("lycoris_lokr", "lokr", use_tucker=True, factor=4, linear_alpha=RANK)
lycoris_case("lycoris_lokr_dora", "lokr", decompose_both=True, dora_wd=True, wd_on_output=True, linear_alpha=RANK)
lycoris_case("lycoris_lokr_full", "lokr", full_matrix=True)
lycoris_case("lycoris_glora", "glora")
lycoris_case("lycoris_oft", "diag-oft", rescaled=True)
lycoris_case("lycoris_oft_limited", "diag-oft", constraint=0.01)
lycoris_case("lycoris_boft", "boft", rescaled=True, linear_dim=8)
lycoris_case("lycoris_ia3", "ia3")
lycoris_case("lycoris_full", "full")


def kind_of(name: str) -> str:
    """Say which models a case is about."""
    return "sdxl" if "sdxl" in name else "sd1"


def make(folder: Path) -> None:
    """Make the models, every case's files, and what comes of them."""
    base, before = {}, {}
    for kind in ("sd1", "sdxl"):
        held = models(kind)
        base[kind], before[kind] = tensors_of(held), run(held, kind)
        for component, module in held.items():
            module.save_pretrained(folder / kind / component)
        index = {"_class_name": "StableDiffusionPipeline"} | {component: ["", type(module).__name__] for component, module in held.items()}
        (folder / kind / "model_index.json").write_text(json.dumps(index))
    for name, adapt in CASES.items():
        kind = kind_of(name)
        for bits in (32, 64) if name not in SINGLE else (32,):
            held = adapt(folder / name, getattr(torch, f"float{bits}"))
            changed = {n: t.contiguous() for n, t in tensors_of(held).items() if not torch.equal(t, base[kind][n].to(t.dtype))}
            save_file(changed, folder / f"{name}.{bits}")
            if bits == 32:
                save_file({"after": run(held, kind), "before": before[kind]}, folder / f"{name}.out")


def run_ours(folder: Path) -> None:
    """Let the models run with our weights."""
    for path in sorted(folder.glob("*.ours")):
        held = models(kind_of(path.stem))
        ours = {name.replace(".text_model.", "."): tensor for name, tensor in load_file(path).items()}
        for component, module in held.items():
            module.load_state_dict({name: ours[f"{component}.{name}".replace(".text_model.", ".")] for name in module.state_dict()})
        save_file({"after": run(held, kind_of(path.stem))}, f"{path}.out")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    if sys.argv[2:] == ["--ours"]:
        run_ours(Path(sys.argv[1]))
    else:
        make(Path(sys.argv[1]))
