package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// What the cluster is made of. Everything is inside namespaces of its own, so
// that the addresses need not be free on the host.
const (
	prefix = "millrace-cluster-" // of namespaces and cgroups
	folder = "/var/cache/millrace-cluster"

	controlV4, controlV6   = "10.89.0.1", "fd00:10:89::1"
	serviceV4, serviceV6   = "10.96.0.0/16", "fd00:10:96::/112"
	podsV4, podsV6         = "10.244.0.0/16", "fd00:10:244::/56"
	kubernetesV4           = "10.96.0.1"
	kubernetesV6           = "fd00:10:96::1"
	dnsV4, dnsV6           = "10.96.0.10", "fd00:10:96::a"
	server                 = "https://" + controlV4 + ":6443"
	control                = prefix + "control" // the namespace of the control plane, and of clients outside
	kubeconfig             = folder + "/kubeconfig"
	adminToken, proxyToken = "admin", "kube-proxy"
)

// nodes is how many there are. Three in three zones are what most tests of zones and
// of several nodes need; each digit of an address has room for nine.
var nodes = 3

const mostNodes = 9

// nodesThere counts the nodes of the cluster that is up.
func nodesThere() int {
	paths, _ := filepath.Glob("/run/netns/" + prefix + "node-*") // the pattern is not malformed
	return len(paths)
}

// node is one node: 1, 2 ...
type node int

func (n node) name() string      { return fmt.Sprintf("node-%d", n) }
func (n node) namespace() string { return prefix + n.name() }
func (n node) zone() string      { return fmt.Sprintf("zone-%d", (n-1)%3+1) }
func (n node) v4() string        { return fmt.Sprintf("10.89.0.1%d", n) }
func (n node) v6() string        { return fmt.Sprintf("fd00:10:89::1%d", n) }
func (n node) podsV4() string    { return fmt.Sprintf("10.244.%d.0/24", n) }
func (n node) podsV6() string    { return fmt.Sprintf("fd00:10:244:%d::/64", n) }

// file of this node, below the cluster's folder.
func (n node) file(path ...string) string {
	return filepath.Join(append([]string{folder, n.name()}, path...)...)
}

func allNodes() (all []node) {
	for n := node(1); int(n) <= nodes; n++ {
		all = append(all, n)
	}
	return all
}

// namespaces are all network namespaces of the cluster.
func namespaces() []string {
	all := []string{control}
	for _, n := range allNodes() {
		all = append(all, n.namespace())
	}
	return all
}

// inside is a command in one of our network namespaces.
func inside(namespace, program string, arguments ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=/run/netns/" + namespace, "--", program}, arguments...)...)
}

// output of a command, with what it said in the error.
func output(command *exec.Cmd) (string, error) {
	text, err := command.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(command.Args, " "), err, lastLines(string(text), 5))
	}
	return string(text), nil
}

// write a file, and the folders above it.
func write(file, content string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(content), mode)
}
