"""What turns docs/, pages elsewhere in the repository and the code into a site: `make docs`."""
