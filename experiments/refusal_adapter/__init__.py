"""What `smollm2-135m-refusal` is taught, how, and what it is asked afterwards."""
