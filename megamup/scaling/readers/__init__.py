"""What a run logged, from wherever it logged it: run folders of ours, wandb, TensorBoard, tables."""
