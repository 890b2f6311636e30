"""The former place of `flowbench.testbeds.shapes`: scripts that were written for the first layout keep working."""
