"""What keeps the processes running: skeleton, logs, health, supervisord, the development stack."""
