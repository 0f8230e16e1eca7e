package cluster

import (
	"fmt"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// How a Deployment runs CoreDNS: where its Corefile is, what is mounted, and what stands in
// its pods' /etc/hosts.
func TestContainerOfCoreDNS(t *testing.T) {
	yes := true
	name := "coredns.example"
	shape := func() (*appsv1.Deployment, *corev1.PodSpec) {
		d := &appsv1.Deployment{}
		pod := &d.Spec.Template.Spec
		pod.Containers = []corev1.Container{{Name: "coredns", Args: []string{"-conf", "/etc/coredns/Corefile"}, VolumeMounts: []corev1.VolumeMount{
			{Name: "config", MountPath: "/etc/coredns/"}, {Name: "custom", MountPath: "/etc/coredns/custom"}, {Name: "tmp", MountPath: "/tmp"}, {Name: "none", MountPath: "/none"},
		}}}
		custom := &corev1.ConfigMapVolumeSource{Optional: &yes}
		custom.Name = "coredns-custom"
		config := &corev1.ConfigMapVolumeSource{Items: []corev1.KeyToPath{{Key: "Corefile", Path: "./Corefile"}}}
		config.Name = "coredns"
		pod.Volumes = []corev1.Volume{
			{Name: "tmp", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
			{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: config}}, {Name: "custom", VolumeSource: corev1.VolumeSource{ConfigMap: custom}},
		}
		return d, pod
	}
	const mounts = " [{/etc/coredns coredns   false [{Corefile Corefile}]} {/etc/coredns/custom coredns-custom   true []} {/tmp  an emptyDir  false []} {/none  a volume that the pod does not have  false []}]"
	for _, row := range []struct {
		what   string
		change func(*corev1.PodSpec)
		want   string
	}{
		{"as it is installed", func(*corev1.PodSpec) {}, `"/etc/coredns/Corefile" "" ""` + mounts},
		{"a command", func(p *corev1.PodSpec) {
			p.Containers[0].Command, p.Containers[0].Args = []string{"/coredns", "-conf=/a"}, []string{"--conf=/etc//coredns/x"}
		}, `"/etc/coredns/x" "" ""` + mounts},
		{"no flag", func(p *corev1.PodSpec) { p.Containers[0].Args = []string{"-dns.port=53"} }, `"" "" ""` + mounts},
		{"a variable", func(p *corev1.PodSpec) { p.Containers[0].Args[1] = "/etc/$(CONF)" }, `"" "" ""` + mounts},
		{"a relative path", func(p *corev1.PodSpec) { p.Containers[0].Args[1] = "Corefile" }, `"" "" ""` + mounts},
		{"a cut flag", func(p *corev1.PodSpec) { p.Containers[0].Args = p.Containers[0].Args[:1] }, `"" "" ""` + mounts},
		{"another name", func(p *corev1.PodSpec) { p.Containers[0].Name = "dns" }, `"/etc/coredns/Corefile" "" ""` + mounts},
		{"nobody knows which", func(p *corev1.PodSpec) {
			p.Containers[0].Name = "dns"
			p.Containers = append(p.Containers, corev1.Container{Name: "sidecar"})
		}, `"" "" "" []`},
		{"aliases", func(p *corev1.PodSpec) {
			p.HostAliases = []corev1.HostAlias{{IP: "192.0.2.1", Hostnames: []string{"a", "b.example"}}, {IP: "192.0.2.2", Hostnames: []string{"c"}}}
		}, `"/etc/coredns/Corefile" "192.0.2.1 a b.example\n192.0.2.2 c\n" ""` + mounts},
		{"the node's network", func(p *corev1.PodSpec) { p.HostNetwork = true }, `"/etc/coredns/Corefile" "" "/etc/hosts is that of the node (hostNetwork)"` + mounts},
		{"a name of its own", func(p *corev1.PodSpec) { p.HostnameOverride = &name }, `"/etc/coredns/Corefile" "" "/etc/hosts has a name of the pod's own (subdomain, hostnameOverride)"` + mounts},
	} {
		d, pod := shape()
		row.change(pod)
		c := containerOf(d)
		if got := fmt.Sprintf("%q %q %q %v", c.Corefile, c.Aliases, c.Hosts, c.Mounts); got != row.want {
			t.Errorf("%s:\n%s, not\n%s", row.what, got, row.want)
		}
	}
}
