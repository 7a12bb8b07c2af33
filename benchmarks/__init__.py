"""What each paper claims and how fast each package is, as commands that write committed figures."""
