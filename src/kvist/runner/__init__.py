"""From a planned batch to tensors to tokens. `build.build_runner` makes the runner of a checkpoint for its device."""
