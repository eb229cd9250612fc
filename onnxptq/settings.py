"""Settings that people write, in Python or YAML: checked by pydantic, refused with an error of this program's own."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

# The metaclass of BaseModel has no public name.
from pydantic._internal._model_construction import ModelMetaclass

from onnxptq.errors import OnnxPtqError


class _Refusing(ModelMetaclass):
    """Turns what pydantic refuses when a class is called. Validation inside other values, which has to tell pydantic
    where it failed, does not come this way."""

    def __call__(self, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            raise cast(type[Settings], self).refused(error) from None


class Settings(BaseModel, metaclass=_Refusing):
    """Base of settings that users of the Python functions make by themselves."""

    @classmethod
    def refused(cls, error: ValidationError) -> OnnxPtqError:
        """What is raised instead of ``error``."""
        raise NotImplementedError


def load_yaml(text: str) -> Any:
    """The plain values of a YAML document.

    Raises:
        yaml.YAMLError: it is none, or a mapping has one key twice, of which YAML would keep the last.
    """
    return yaml.load(text, _UniqueKeys)


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key}' is there twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)
