"""What attention masks mean: padding of batch items, and parts that are causal by frames."""
