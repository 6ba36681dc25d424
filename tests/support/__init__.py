"""What tests share: waiting, scripted servers, builders of values, and a policy gateway that a test directs."""
