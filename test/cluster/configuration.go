package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// configure writes the configuration of everything on a node, into its own /etc.
func configure(n node, w wish) error {
	return errors.Join(
		plugins(w),
		write("/etc/hosts", fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n%s %s\n", n.v4(), n.name(), n.v6(), n.name()), 0o644),
		write("/etc/containerd.toml", containerdConfiguration(), 0o644),
		write("/etc/kubelet.yaml", kubeletConfiguration(), 0o644),
		write("/etc/kube-proxy.yaml", kubeProxyConfiguration(w.mode, n.name(), pki("kube-proxy.kubeconfig")), 0o644),
		podNetwork(n, w))
}

// pluginFolder is where nodes have their CNI plug-ins, as usual.
const pluginFolder = "/opt/cni/bin"

// plugins puts those of the distribution there that a node needs: containerd starts loopback
// itself; portmap is for hostPort, which millrace serves itself.
func plugins(w wish) error {
	names := []string{"loopback"}
	if w.cni == "ptp" {
		names = append(names, "portmap", "ptp", "host-local")
	}
	if w.cni == flannel {
		names = append(names, "portmap", "bridge", "host-local")
	}
	for _, name := range names {
		content, err := os.ReadFile(filepath.Join("/usr/lib/cni", name))
		if err != nil {
			return err
		}
		if err := write(filepath.Join(pluginFolder, name), string(content), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// Without CAP_SYS_RESOURCE, as in many virtual machines, runc cannot lower an OOM
// score, and no pod would start: so it is told not to.
func containerdConfiguration() string {
	return fmt.Sprintf(`version = 2
[plugins."io.containerd.internal.v1.opt"]
path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "%s"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "%s"
conf_dir = "/etc/cni/net.d"
`, pauseImage, pluginFolder)
}

func kubeletConfiguration() string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
clusterDNS: ["%s"]
clusterDomain: cluster.local
resolvConf: ""
oomScoreAdj: 0
volumePluginDir: /var/lib/kubelet/volume-plugins
# The disk is that of the host, and not ours to clear.
imageGCHighThresholdPercent: 100
evictionHard: {}
`, dnsV4)
}

// kubeProxyConfiguration for a node of a name, or for all.
func kubeProxyConfiguration(mode, name, kubeconfig string) string {
	// How many connections may be tracked is said by the host alone.
	return fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: "%s"
hostnameOverride: "%s"
clusterCIDR: "%s,%s"
clientConnection: {kubeconfig: %s}
conntrack: {maxPerCore: 0, min: 0}
oomScoreAdj: 0
`, mode, name, podsV4, podsV6, kubeconfig)
}

// podNetwork is a veth for each pod, and routes: no bridge, no masquerade. millrace puts its
// own list there.
func podNetwork(n node, w wish) error {
	switch w.cni {
	case millrace:
		return nil
	case flannel:
		return flannelNetwork(n)
	}
	return write("/etc/cni/net.d/10-ptp.conflist", fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "ptp", "ipMasq": false, "mtu": 1500, "ipam": {"type": "host-local",
    "ranges": [[{"subnet": "%s"}], [{"subnet": "%s"}]],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}
]}
`, n.podsV4(), n.podsV6()), 0o644)
}
