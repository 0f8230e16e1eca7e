package main

import (
	"fmt"
	"os/exec"
	"strings"
)

// The network: a bridge in the namespace of the control plane, an uplink to it in
// each node, and static routes to the pods, as between machines of one rack.
//
//	control (bridge br0 .1) -- eth0 of node-1 (.11) -- pods 10.244.1.0/24
//	                        -- eth0 of node-2 (.12) -- pods 10.244.2.0/24, and so on
//
// The control plane reaches Services through node 1. Where millrace or flannel gives pods
// their network, nodes are without these routes: and the control plane, by which their default
// routes lead, hands nothing on for them.
func network(w wish) error {
	for _, namespace := range namespaces() {
		if err := addNamespace(namespace); err != nil {
			return err
		}
	}
	err := ipBatch(control, []string{
		"link add br0 type bridge",
		"addr add " + controlV4 + "/24 dev br0",
		"addr add " + controlV6 + "/64 dev br0 nodad",
		"link set br0 up",
	})
	if err != nil {
		return err
	}
	for _, n := range allNodes() {
		if err := connect(n, w.cni == "ptp"); err != nil {
			return fmt.Errorf("connect %s: %w", n.name(), err)
		}
	}
	if w.cni != "ptp" {
		if _, err := output(inside(control, "sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")); err != nil {
			return err
		}
	}
	return ipBatch(control, []string{
		"route add " + serviceV4 + " via " + node(1).v4(),
		"route add " + serviceV6 + " via " + node(1).v6(),
	})
}

func connect(n node, routes bool) error {
	port := n.name()
	err := ipBatch(control, []string{
		"link add " + port + " type veth peer name eth0 netns " + n.namespace(),
		"link set " + port + " master br0 up",
		"route add " + n.podsV4() + " via " + n.v4(),
		"route add " + n.podsV6() + " via " + n.v6(),
	})
	if err != nil {
		return err
	}
	lines := []string{
		"addr add " + n.v4() + "/24 dev eth0",
		"addr add " + n.v6() + "/64 dev eth0 nodad",
		"link set eth0 up",
		"route add default via " + controlV4,
		"route add default via " + controlV6,
	}
	for _, other := range allNodes() {
		if other != n && routes {
			lines = append(lines, "route add "+other.podsV4()+" via "+other.v4(), "route add "+other.podsV6()+" via "+other.v6())
		}
	}
	return ipBatch(n.namespace(), lines)
}

// addNamespace makes a namespace that forwards.
func addNamespace(namespace string) error {
	if _, err := output(exec.Command("ip", "netns", "add", namespace)); err != nil {
		return err
	}
	if err := ipBatch(namespace, []string{"link set lo up"}); err != nil {
		return err
	}
	_, err := output(inside(namespace, "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"))
	return err
}

// ipBatch gives lines to ip, in a namespace. The family of a route is that of its
// addresses.
func ipBatch(namespace string, lines []string) error {
	command := exec.Command("ip", "-n", namespace, "-batch", "-")
	command.Stdin = strings.NewReader(strings.Join(lines, "\n"))
	_, err := output(command)
	return err
}
