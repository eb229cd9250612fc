"""``python -m onnxptq``, as ``torchrun -m onnxptq`` needs it."""

from onnxptq.cli.main import main

if __name__ == "__main__":
    main()
