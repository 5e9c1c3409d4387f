"""BLIP-3 (xGen-MM), the paper's base model.

SigLIP encodes the frames, a Perceiver resampler makes a few vectors of each, and Phi-3 reads them amid the prompt.

Parameter names are those of the published checkpoint (without its leading ``vlm.``), so that it loads as it is.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Phi3Config, Phi3Model, SiglipVisionConfig, SiglipVisionModel

from framseg import config
from framseg.backbones import CheckpointError
from framseg.jsonl import shortlist

PREFIX = "vlm."  # what the published checkpoint puts before every name
ADAPTER = "default"


class ResamplerAttention(nn.Module):
    """The latents of each frame attend to its patches and to themselves."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, patches: Tensor, latents: Tensor) -> Tensor:
        """patches [N, P, width], latents [N, latents, width] -> what to add to the latents, of their shape."""
        latents = self.norm_latents(latents)
        key, value = self.to_kv(torch.cat([self.norm_media(patches), latents], dim=1)).chunk(2, dim=-1)
        by_head = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(latents), key, value))
        return self.to_out(F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2))


class ResamplerLayer(nn.ModuleList):
    """Attention and a feed-forward network; a list, as the published names are ``layers.0.0`` and ``layers.0.1``."""

    def __init__(self, width: int, heads: int, head_dim: int):
        attention, inner = ResamplerAttention(width, heads, head_dim), 4 * width
        up, down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        super().__init__([attention, nn.Sequential(nn.LayerNorm(width), up, nn.GELU(), down)])

    def forward(self, patches: Tensor, latents: Tensor) -> Tensor:
        """patches [N, P, width], latents [N, latents, width] -> new latents."""
        attention, feed_forward = self
        latents = latents + attention(patches, latents)
        return latents + feed_forward(latents)


class Resampler(nn.Module):
    """Perceiver resampler: makes a fixed number of vision tokens of the patches of each frame."""

    def __init__(self, section: config.Resampler, width: int, out: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(section.latents, width))
        layers = [ResamplerLayer(width, section.heads, section.head_dim) for _ in range(section.layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, out)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [N, P, vision width] -> vision tokens [N, latents, language width]."""
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(patches, latents)
        return self.projection(self.norm(latents))


class SplitEmbedding(nn.Embedding):
    """Embedding whose ids from `used` on are rows of a second, small table."""

    def __init__(self, rows: int, width: int, used: int, extra: int):
        super().__init__(rows, width)
        self.used = used
        self.additional_embedding = nn.Embedding(extra, width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> vectors [B, L, width]."""
        new = ids >= self.used
        out = super().forward(ids.masked_fill(new, 0))
        return torch.where(new.unsqueeze(-1), self.additional_embedding((ids - self.used).clamp(min=0)), out)


class SplitHead(nn.Linear):
    """Output head over the first `used` ids and, from a second, small table, the extra ids after them."""

    def __init__(self, width: int, rows: int, used: int, extra: int):
        super().__init__(width, rows)
        self.used = used
        self.additional_fc = nn.Linear(width, extra)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden states [..., width] -> logits [..., used + extra]."""
        known = F.linear(hidden, self.weight[: self.used], self.bias[: self.used])
        return torch.cat([known, self.additional_fc(hidden)], dim=-1)


class LanguageModel(nn.Module):
    """Phi-3, with the two-part embedding and head of the published checkpoint."""

    def __init__(self, section: config.Language, attention: str):
        super().__init__()
        same = {"hidden_size", "intermediate_size", "initializer_range", "sliding_window"}  # names in both
        phi3 = Phi3Config(
            **section.model_dump(include=same),
            vocab_size=1,  # its own table is replaced below: the real one has a second part
            num_hidden_layers=section.layers,
            num_attention_heads=section.heads,
            max_position_embeddings=section.context,
            original_max_position_embeddings=section.context,
            rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        phi3._attn_implementation = attention
        self.model = Phi3Model(phi3)
        sizes = section.used_vocab, section.extra_rows
        self.model.embed_tokens = SplitEmbedding(section.vocab_size, section.hidden_size, *sizes)
        self.lm_head = SplitHead(section.hidden_size, section.vocab_size, *sizes)
        for table in (self.model.embed_tokens, self.model.embed_tokens.additional_embedding, self.lm_head):
            nn.init.normal_(table.weight, std=section.initializer_range)
        nn.init.zeros_(self.lm_head.bias)
        if section.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class Blip3(nn.Module):
    """The model that `profile.model` describes, with random weights; `load_published` makes one with a checkpoint's.

    The vision encoder is never trained (Section "Model" of the paper): it runs without an autograd graph.
    """

    origin = ""  # what a user should know of the weights, a sentence

    def __init__(self, section: config.Model):
        super().__init__()
        self.section = section
        sizes = section.vision.model_dump(exclude={"layers", "heads"})
        layers, heads = section.vision.layers, section.vision.heads
        vision = SiglipVisionConfig(**sizes, num_hidden_layers=layers, num_attention_heads=heads)
        vision._attn_implementation = section.attention
        self.vision_encoder = SiglipVisionModel(vision)
        self.vision_tokenizer = Resampler(section.resampler, section.vision.hidden_size, section.language.hidden_size)
        self.lang_model = LanguageModel(section.language, section.attention)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.vision_tokenizer.latents.device

    def vision_features(self, pixels: Tensor) -> Tensor:
        """Last hidden state of SigLIP after its post-layernorm.

        pixels: [N, 3, H, W], uint8 RGB or floats already scaled to [-1, 1]. Returns [N, patches, vision width].
        """
        encoder = self.vision_encoder
        if pixels.dtype == torch.uint8:
            pixels = pixels.to(encoder.post_layernorm.weight.dtype) / 127.5 - 1
        # Not encoder(pixels): that would also compute the pooling head, which nothing reads.
        hidden = encoder.encoder(inputs_embeds=encoder.embeddings(pixels)).last_hidden_state
        return encoder.post_layernorm(hidden)

    def vision_tokens(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, f, 3, H, W] (see `vision_features`) -> [B, f, latents, language width]."""
        with torch.no_grad():
            features = self.vision_features(pixel_values.flatten(0, 1))
        return self.resampled(features.unflatten(0, pixel_values.shape[:2]))

    def resampled(self, features: Tensor) -> Tensor:
        """vision_features [B, f, patches, vision width] -> vision tokens [B, f, latents, language width]."""
        return self.vision_tokenizer(features.flatten(0, 1)).unflatten(0, features.shape[:2])

    def expand(self, ids: Tensor, mask: Tensor, vision_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed the prompts, with the vision tokens of each frame in the place of its <image> id.

        ids, mask: [B, L]; vision_tokens: [B, f, latents, width]. Returns embeddings [B, L', width] and attention mask
        [B, L'], L' = L + f (latents - 1), and for each id its position there, [B, L] (of <image>, that of its last
        vector). Raises ValueError unless every prompt has f <image> ids.
        """
        is_image = ids == self.section.tokens.image
        frames, latents = vision_tokens.shape[1:3]
        counts = is_image.sum(1).tolist()
        if set(counts) != {frames}:
            raise ValueError(f"the prompts hold {counts} <image> tokens, but {frames} frames per sample were given")
        repeats = torch.where(is_image, latents, 1)
        places = repeats.cumsum(1) - 1
        length = ids.shape[1] + frames * (latents - 1)
        every = torch.arange(ids.numel(), device=ids.device)
        source = torch.repeat_interleave(every, repeats.flatten(), output_size=len(ids) * length)
        long_ids = ids.flatten()[source].view(-1, length)
        embeds = self.lang_model.model.embed_tokens(long_ids)
        slots = (long_ids == self.section.tokens.image).unsqueeze(-1)
        embeds = embeds.masked_scatter(slots, vision_tokens.to(embeds.dtype))
        return embeds, mask.flatten()[source].view(-1, length), places

    def forward(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        vision_features: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits.

        pixel_values: [B, f, 3, H, W], uint8 or floats in [-1, 1]; or None, and instead what was made of them, as
        `vision_features` [B, f, patches, width] or `vision_tokens` [B, f, latents, width].
        input_ids, attention_mask: [B, L], each sample with f <image> ids, padded left or right.
        positions: [B, P] indexes into input_ids whose logits are computed: [B, P, used + extra ids]. Without them
        those of all expanded positions are: [B, L + f (latents - 1), used + extra ids].
        """
        if vision_features is not None:
            vision_tokens = self.resampled(vision_features)
        elif vision_tokens is None:
            if pixel_values is None:
                raise ValueError("give pixel_values, vision_features or vision_tokens")
            vision_tokens = self.vision_tokens(pixel_values)
        embeds, mask, places = self.expand(input_ids, attention_mask, vision_tokens)
        hidden = self.lang_model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        if positions is not None:
            index = places.gather(1, positions).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
            hidden = hidden.gather(1, index)
        return self.lang_model.lm_head(hidden)

    def digit_logits(self, logits: Tensor) -> Tensor:
        """The two digits' columns of logits [..., ids], as [..., 2] in the order '0', '1'."""
        return logits[..., [self.section.tokens.zero, self.section.tokens.one]]

    def recompute_layers(self) -> None:
        """When training, keep only the input of each language layer and compute the layer again for its gradients."""
        language = self.lang_model.model
        # transformers renamed the method in 5.23; the versions from 5.17 on know the old name alone.
        enable = getattr(language, "activation_checkpointing_enable", None) or language.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    @classmethod
    def load_published(cls, section: config.Model, folder: Path | str) -> "Blip3":
        """Build the model from a folder of safetensors (one file or shards) in the published layout.

        Tensors are loaded one at a time, so that memory never holds the weights twice. Raises CheckpointError with
        missing, unexpected and misshapen names, the first few of many.
        """
        folder = Path(folder)
        with init_empty_weights(include_buffers=False):
            model = cls(section)
        files = sorted(folder.glob("*.safetensors"))
        for index in folder.glob("*.safetensors.index.json"):  # which files are of the checkpoint
            names = re.findall(r'"([^"/]+\.safetensors)"', index.read_text("utf-8", "replace"))
            files = [folder / name for name in sorted(set(names))]
        if not files:
            raise CheckpointError(f"{folder}: no .safetensors file here; give the folder of a published checkpoint")
        if lacking := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{folder}: lacks {shortlist(lacking, most=5)}, named by the index; fetch it again")
        expected = model.state_dict()
        if section.language.tie_embeddings:
            del expected["lang_model.lm_head.weight"]
        missing, problems = set(expected), list[str]()
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    for key in opened.keys():
                        name, shape = key.removeprefix(PREFIX), opened.get_slice(key).get_shape()
                        if name not in expected:
                            problems.append(f"unexpected {key} {shape}")
                        elif shape != (own := list(expected[name].shape)):
                            problems.append(f"{key} is {shape}, the profile's is {own}")
                        else:
                            tensor = opened.get_tensor(key).to(getattr(torch, section.dtype))
                            model.load_state_dict({name: tensor}, strict=False, assign=True)
                        missing.discard(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: damaged or not a safetensors file ({error}); fetch it again") from None
        problems += [f"missing {PREFIX}{name}" for name in sorted(missing)]
        if problems:
            raise CheckpointError(f"{folder}: not a checkpoint of this model: {shortlist(problems, '; ', most=5)}")
        if section.language.tie_embeddings:
            model.lang_model.lm_head.weight = model.lang_model.model.embed_tokens.weight
        return model.eval()

    def save_published(self, folder: Path | str) -> None:
        """Write the weights in the published layout: safetensors, shards of at most 5 GB, names under ``vlm.``."""
        state = {PREFIX + name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.section.language.tie_embeddings:
            del state[f"{PREFIX}lang_model.lm_head.weight"]
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(state, folder)

    def adapt(self, section: config.Adapter, seed: int) -> dict[str, Tensor]:
        """Freeze the model, then make the resampler and a PiSSA + rsLoRA pair on every linear layer of Phi-3 trainable.

        A pair A, B starts as the principal part of the layer's weight, and what remains stays in the weight: the
        outputs do not change. Returns the pairs as they start, by parameter name; `adapter` needs them.
        """
        self.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # PiSSA's fast SVD starts from random vectors
            settings = LoraConfig(
                r=section.rank,
                lora_alpha=section.alpha,  # type: ignore[arg-type]  # peft computes with any number
                lora_dropout=section.dropout,
                init_lora_weights=section.init,  # type: ignore[arg-type]  # the profile lets only peft's names pass
                use_rslora=section.rslora,
                target_modules=rf"lang_model\.model\.layers\.\d+\.\w+\.({'|'.join(section.targets)})",
            )
            inject_adapter_in_model(settings, self, ADAPTER)
        self.vision_tokenizer.requires_grad_(True)
        return {name: value.clone() for name, value in self.state_dict().items() if "lora_" in name}

    def adapter(self, start: dict[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
        """The trained pairs as a plain LoRA adapter of the untouched base: its settings and tensors in peft's format.

        PiSSA moved s B0 A0, `start` as `adapt` returned it, out of each weight, so training changed it by
        s (B A - B0 A0): one pair of twice the rank.
        """
        state, tensors = self.state_dict(), {}
        layers = {name: layer for name, layer in self.named_modules() if isinstance(layer, LoraLayer)}
        for name in layers:
            for half, dim, sign in (("lora_A", 0, 1), ("lora_B", 1, -1)):
                key = f"{name}.{half}.{ADAPTER}.weight"
                pair = [state[key].float().cpu(), sign * start[key].float().cpu()]
                tensors[f"base_model.model.{name}.{half}.weight"] = torch.cat(pair, dim).contiguous()
        layer = next(iter(layers.values()))
        rank = 2 * layer.r[ADAPTER]
        alpha = layer.scaling[ADAPTER] * rank
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), inference_mode=True), tensors
