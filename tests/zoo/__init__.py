"""A tiny random model of almost every model type of transformers, and inputs on which it runs.

    import zoo

    built = zoo.build("llama", zoo.model_classes("llama")[0])
    built.model(**built.inputs)

Each type is shrunk from its own config class to a few small layers by rules on the names of its settings, and built on
the CPU with random weights, biases and norms included, so that a wrong permutation shows. Settings and inputs that no
rule finds are in `configs` and `hand_inputs`. Types that are not listed are built by the same rules, with luck.

A few types are slow or large: build each in a process of its own with a limit on its time and memory.
"""

from .building import Built, ZooError, all_types, build, listed_types, model_classes

__all__ = ["Built", "ZooError", "all_types", "build", "listed_types", "model_classes"]
