"""An agent memory that lives inside the model's own attention."""
