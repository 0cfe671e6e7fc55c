"""What every section of a config is made of: frozen keys, variants that use some of them, URIs.

Unknown keys are errors, and so are keys that the chosen variant would not use: `freeze.num_stages`
under `freeze.strategy: head`, `optim.momentum` under `optim.optimizer: adamw`. Such keys are None
until a variant that uses them is chosen, which fills in its default.
"""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from tlrunner.uris import has_credentials


def _without_credentials(uri: str) -> str:
    if has_credentials(uri):
        raise ValueError(
            "a URI with credentials in it, which would be shown and stored; valid: "
            "s3://BUCKET/..., with the credentials in the usual AWS variables or profile"
        )
    return uri


Uri = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_without_credentials)]


class Section(BaseModel):
    """A frozen group of keys, some of which only certain variants of it use.

    `variants` maps a selecting key to {its value: {key used by that value: default}}.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
    variants: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _fill_used_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for selector, uses in cls.variants.items():
            chosen = values.get(selector, cls.model_fields[selector].default)
            if not isinstance(chosen, str) or chosen not in uses:
                continue  # not a valid choice: the field's own validation says so
            for key in {key for used in uses.values() for key in used} - set(uses[chosen]):
                if values.get(key) is not None:
                    users = [name for name, used in uses.items() if key in used]
                    raise ValueError(
                        f"'{key}' is not used with {selector} '{chosen}'; "
                        f"it is used with: {', '.join(users)}"
                    )
            for key, default in uses[chosen].items():
                if values.get(key) is None:
                    values[key] = default
        return values
