// Package cni is both ends of a socket over which container runtimes ask a node's agent
// for the network of pods: the plugin that a runtime starts, and the server in the agent.
//
// The plugin (Main) does nothing but ask. It reads what CNI says that a plugin is given
// (https://www.cni.dev/docs/spec/, version 1.1), hands it to the agent with an open file
// of the pod's network namespace, so that the agent needs none of the runtime's folders,
// and prints the answer. Where the agent is not there it waits a moment, for agents are
// upgraded, and then says so with an error that makes the runtime try again.
//
// It writes a socket, which only root may use. An ADD costs one process and one
// connection beside what the agent does.
package cni
