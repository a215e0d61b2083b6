"""Calls to experts, remote or in this process, behind the ExpertTransport protocol."""
