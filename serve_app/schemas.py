"""Requests and replies of the HTTP API; OpenAPI is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator

from mlray import languages

Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Tag = Annotated[str, StringConstraints(min_length=2, max_length=35)]
MANY, _TURNS, _SESSION, _WORDS = 4096, 64, 512, 256
"""Texts of a request, messages of a conversation, products of a session and words of a glossary, beyond which it is not
looked at; `serving.max_texts` is less."""
_Texts = Annotated[list[Text], Field(min_length=1, max_length=MANY)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]
_Word = Annotated[str, StringConstraints(min_length=1, max_length=64, strip_whitespace=True)]


def _market(tag: str) -> str:
    normal = languages.normalize(tag)
    if normal is None:
        raise ValueError("a market is a tag such as de or pt-BR")
    return normal


Market = Annotated[str, StringConstraints(max_length=35), AfterValidator(_market)]
"""As `jobs/index.py` names it, whatever its spelling in a request."""
LANGUAGE = Field(None, description="BCP 47; else Accept-Language, else detected", examples=["de"])


class _Request(BaseModel):
    """Unknown fields are refused: a misspelt one would be ignored in silence."""

    model_config = ConfigDict(extra="forbid")


class Served(BaseModel):
    """What has answered; a reply is of one bundle and of the index that this bundle has built."""

    bundle: str
    index: str | None = None
    step: Literal["language", "related", "base", "pivot"] = Field(
        description="by the own adapter, a related language's, the model without one, or through a third language"
    )
    adapter: str | None = None


class ServedBy(Served):
    """The same, to a text in a language."""

    language: str
    known_by: Literal["declared", "header", "detected", "default"]


class SearchRequest(_Request):
    """A customer's words, in any language, for the products of a market."""

    query: Text = Field(examples=["wasserdichte Wanderschuhe"])
    market: Market = Field(examples=["de"])
    language: Tag | None = LANGUAGE
    k: int = Field(10, ge=1, le=100, description="products, at most")


class Hit(BaseModel):
    """A product."""

    id: str
    score: float = Field(description="cosine similarity to the query")
    title: str | None = None


class SearchReply(BaseModel):
    """Products, the nearest first."""

    results: list[Hit]
    served_by: ServedBy


class RecommendRequest(_Request):
    """What a customer has looked at or bought."""

    market: Market = Field(examples=["de"])
    products: list[Name] = Field(
        [],
        max_length=_SESSION,
        description="ids, the last one last; none: for somebody new",
        examples=[["p001"]],
    )
    query: Text | None = Field(None, description="what the customer has searched for")
    k: int = Field(10, ge=1, le=100, description="products, at most")


class Wanted(Hit):
    """A product that may be wanted next."""

    score: float = Field(
        description="by sessions: a logit; by texts or items: cosine similarity to those of the session"
    )
    by: Literal["sessions", "texts", "items"] = Field(
        description="of other customers; or products like those of the session, by texts or, without, by sessions"
    )


class RecommendReply(BaseModel):
    """Products, the likeliest first."""

    results: list[Wanted]
    unknown: list[str] = Field(description="products of the request of which nothing is known")
    served_by: Served


class TranslateRequest(_Request):
    """Texts of one language for another."""

    texts: _Texts = Field(description="of one language", examples=[["Wo bleibt meine Bestellung AB-1234?"]])
    target: Tag = Field(description="BCP 47", examples=["en"])
    language: Tag | None = Field(None, description="BCP 47, of the texts; else detected", examples=["de"])
    glossary: dict[_Word, _Word] = Field(
        {},
        max_length=_WORDS,
        description="a word or phrase -> its translation",
        examples=[{"Bestellung": "order"}],
    )
    names: list[_Word] = Field([], max_length=_WORDS, description="what stays as it is, such as brands")


class TranslationReply(BaseModel):
    """A text in another language."""

    text: str
    kept: list[str] = Field(
        description="what was protected: numbers, addresses, names, words of the glossary"
    )
    whole: bool = Field(description="false: what lies between protected parts was translated part by part")


class TranslateReply(BaseModel):
    """Translations in the order of the texts."""

    translations: list[TranslationReply]
    way: list[str] = Field(description="the languages that the texts went through")
    quality: float | None = Field(
        description="chrF in the bundle's evaluation, of 100, of two legs their product; null: nothing is translated"
    )
    served_by: ServedBy


class Message(_Request):
    """A turn of a conversation."""

    role: Literal["user", "assistant"] = "user"
    text: Text = Field(examples=["Wo bleibt meine Bestellung?"])


class SupportRequest(_Request):
    """A conversation; its last message is the customer's."""

    messages: list[Message] = Field(min_length=1, max_length=_TURNS)
    language: Tag | None = LANGUAGE
    k: int = Field(3, ge=1, le=20, description="sources, at most")
    write: bool = Field(
        False, description="from the sources, in the words of the bundle's writer, if it has one"
    )
    stream: bool = Field(
        False, description="server-sent events: `sources` at once, `answer` in parts, `done`"
    )

    @field_validator("messages")
    @classmethod
    def _asks(cls, messages: list[Message]) -> list[Message]:
        if messages[-1].role != "user":
            raise ValueError("the last message is the customer's (role: user)")
        return messages


class SourceReply(BaseModel):
    """An answer of the shop's own knowledge."""

    id: str
    language: str
    text: str
    score: float


class SupportReply(BaseModel):
    """An answer with its sources, or that a person is to take over."""

    answer: str | None
    written: bool = Field(description="by a model, from the first source; false: that as it is")
    translated: bool = Field(description="from the language of the first source into the customer's")
    intent: str | None
    language: str | None = Field(description="of the answer; it may be another than the customer's")
    confidence: float = Field(description="cosine similarity of the nearest source")
    hand_over: bool = Field(description="nothing is sure enough: a person is to answer")
    scope: Literal["language", "related", "other"] = Field(description="where the sources were found")
    sources: list[SourceReply]
    served_by: ServedBy


class ProductId(_Request):
    """A product of a market."""

    market: Market = Field(examples=["de"])
    id: Name = Field(examples=["p001"])


class Product(ProductId):
    """A product and the text by which it is found."""

    text: Text = Field(
        description="the first line is its title", examples=["Wasserkocher, 1,7 l\nFünf Stufen ..."]
    )


class ProductsRequest(_Request):
    """Products that are new, or have another text now."""

    products: list[Product] = Field(min_length=1, max_length=MANY)


class DeleteRequest(_Request):
    """Products that are not sold any more."""

    products: list[ProductId] = Field(min_length=1, max_length=MANY)


class ChangeReply(BaseModel):
    """What has changed."""

    change: int = Field(description="its number; replicas take changes up in this order")
    products: int
    taken_up: bool = Field(description="whether the replica that has answered finds it already")
    unknown: list[tuple[str, str]] = Field(description="market and id of those that were not there")
    bundle: str
    index: str


class EmbeddingsRequest(BaseModel):
    """As OpenAI's; fields that mean nothing here are passed over."""

    input: Text | _Texts = Field(examples=[["red shoes", "rote Schuhe"]])
    model: str | None = Field(None, description="a bundle's id, or `champion`", examples=["champion"])
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="the first so many, brought to unit length")
    language: Tag | None = LANGUAGE


class Embedding(BaseModel):
    """A unit vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="numbers, or base64 of little-endian float32")


class Usage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(BaseModel):
    """As OpenAI's, and what has answered."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    served_by: ServedBy


class ModelsReply(BaseModel):
    """Champion and challenger with their reports per language."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    fault: str = Field("", description="what newer is not taken up")
    latency: dict[str, dict[str, float | None]] = Field(
        {},
        description="language -> answers of this ingress, and seconds below which 50 and 95 % of them were given",
    )


class Fault(BaseModel):
    """Why a request is refused."""

    code: str = Field(examples=["unknown_market"])
    message: str
    type: str
    request_id: str


class Refusal(BaseModel):
    """The body of every reply that is not 2xx."""

    error: Fault
