package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// flannel is the word for flannel, as who gives pods their network.
const flannel = "flannel"

// flannelModule is where go.mod names its version.
const flannelModule = moduleFolder + "/flannel"

// flannelConf is flannel's configuration: nftables, for the other way asks for the module
// br_netfilter.
const flannelConf = `{"Network": "` + podsV4 + `", "EnableIPv6": true, "IPv6Network": "` + podsV6 + `", "EnableNFTables": true, "Backend": {"Type": "vxlan"}}`

// flannelObjects are those of flannel's manifest that others read.
const flannelObjects = `
apiVersion: v1
kind: Namespace
metadata: {name: kube-flannel}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: kube-flannel-cfg, namespace: kube-flannel}
data: {net-conf.json: '` + flannelConf + `'}
`

// buildFlannel makes flanneld beside the other binaries, if it is not there.
func buildFlannel(ctx context.Context, folder string) error {
	file := filepath.Join(folder, "flanneld")
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	say("build flanneld")
	at, err := inModule(ctx, "list", "-m", "-f", "{{.Dir}}", "github.com/flannel-io/flannel")
	if err != nil {
		return fmt.Errorf("find the source of flannel: %w", err)
	}
	source, err := writeFlannel(strings.TrimSpace(at), folder)
	if err != nil {
		return err
	}
	if _, err := inModule(ctx, "build", "-ldflags", "-s -w", "-o", file+".part", source); err != nil {
		return fmt.Errorf("build flanneld: %w", err)
	}
	return os.Rename(file+".part", file)
}

// inModule runs go where flannel's version is.
func inModule(ctx context.Context, arguments ...string) (string, error) {
	return goTool(ctx, append([]string{arguments[0], "-C", "flannel"}, arguments[1:]...)...)
}

// writeFlannel writes flannel's own main without the backends that are not asked for: one
// needs C, and one a module that the proxy does not give out.
func writeFlannel(source, folder string) (string, error) {
	text, err := os.ReadFile(filepath.Join(source, "main.go"))
	if err != nil {
		return "", fmt.Errorf("find flannel's main: %w", err)
	}
	others := regexp.MustCompile(`(?m)^\t_ "[^"]*/pkg/backend/(?:alloc|extension|ipip|ipsec|tencentvpc|udp|wireguard)"\n`)
	file := filepath.Join(folder, "flanneld.go")
	return file, os.WriteFile(file, others.ReplaceAll(text, nil), 0o644)
}

// flannelNetwork is what flannel's plug-in delegates to: a bridge with the range of the
// node.
func flannelNetwork(n node) error {
	return errors.Join(
		write("/etc/kube-flannel/net-conf.json", flannelConf, 0o644),
		write("/etc/cni/net.d/10-flannel.conflist", fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "cbr0", "plugins": [
  {"type": "bridge", "bridge": "cni0", "mtu": 1450, "isDefaultGateway": true, "hairpinMode": true, "ipMasq": false,
    "ipam": {"type": "host-local", "ranges": [[{"subnet": "%s"}], [{"subnet": "%s"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}
]}
`, n.podsV4(), n.podsV6()), 0o644))
}

// flannelService is flanneld as its DaemonSet starts it, as a process of the node.
func flannelService(n node) (*service, error) {
	return &service{name: "flanneld", arguments: []string{"--kube-subnet-mgr", "--ip-masq", "--iface=eth0", "--kubeconfig-file=" + kubeconfig}},
		os.Setenv("NODE_NAME", n.name())
}

// installFlannel waits for flannel on all nodes: each has its device.
func installFlannel(ctx context.Context) error {
	say("flannel")
	for _, n := range allNodes() {
		err := until(ctx, "flannel on "+n.name(), time.Minute, func() error {
			_, err := output(inside(n.namespace(), "ip", "link", "show", "flannel-v6.1", "up"))
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}
