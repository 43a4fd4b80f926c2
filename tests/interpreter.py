"""Triton's interpreter, which runs the kernels where there is no GPU."""

import importlib.util
import os


def use_interpreter():
    """For this process and what it starts; before any kernel is defined."""
    os.environ["TRITON_INTERPRET"] = "1"
    if not importlib.util.find_spec("triton"):
        return
    from triton.runtime import interpreter

    # Whether an int32 overflows, which no size of these tests can bring about, takes half of its time.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        # Triton 3.6 asks for int() of an array of one number, which NumPy 2.4 does not give any more.
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
