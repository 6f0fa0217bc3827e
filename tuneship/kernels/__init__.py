"""What makes a step fast: attention over packed rows, and the loss at the labels only.

Everything here is arithmetic on tensors; nothing here knows recipes, files or PEFT.
"""
