"""What board and host share: errors, files, text, random numbers, units, the state's form. numpy only."""
