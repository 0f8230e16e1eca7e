package dir

import (
	"strings"
	"testing"
)

// Of ConfigMaps the one of CoreDNS is read, wherever it stands; others count as passed over.
func TestCorefileOfAFolder(t *testing.T) {
	t.Chdir(t.TempDir())
	const other = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: coredns, namespace: shop}\ndata: {Corefile: \".\"}\n"
	write(t, "other.yaml", other)
	s := readAll(t, ".")
	if s.DNS != nil || s.Ignored["ConfigMap"] != 1 || s.Unread > 0 {
		t.Errorf("DNS %+v, ignored %v, unread %d", s.DNS, s.Ignored, s.Unread)
	}
	write(t, "dns.yaml", other+"---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: coredns, namespace: kube-system}\ndata:\n  Corefile: |\n    .:53 {\n      kubernetes cluster.local\n      hosts\n    }\n")
	s = readAll(t, ".")
	if s.DNS == nil || s.DNS.Zone != "cluster.local" || !strings.HasPrefix(s.DNS.Left, "Corefile:3: hosts") || s.Ignored["ConfigMap"] != 2 || len(s.Problems) > 0 {
		t.Errorf("DNS %+v, ignored %v, problems %v", s.DNS, s.Ignored, s.Problems)
	}
	write(t, "dns.yaml", other)
	if s = readAll(t, "."); s.DNS != nil {
		t.Errorf("DNS %+v after it is gone", s.DNS)
	}
}

// What the Corefile of a folder imports is read from the folder.
func TestImportsOfAFolder(t *testing.T) {
	t.Chdir(t.TempDir())
	const config = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: coredns, namespace: kube-system}\ndata:\n  Corefile: |\n    .:53 {\n      kubernetes cluster.local\n      import custom/*.override\n    }\n"
	const custom = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: coredns-custom, namespace: kube-system}\ndata: {a.override: forward . 192.0.2.9}\n"
	const deployment = `---
apiVersion: apps/v1
kind: Deployment
metadata: {name: coredns, namespace: kube-system}
spec:
  selector: {matchLabels: {k8s-app: kube-dns}}
  template:
    metadata: {labels: {k8s-app: kube-dns}}
    spec:
      containers: [{name: coredns, image: coredns, command: [/coredns, -conf=/etc/coredns/Corefile], volumeMounts: [{name: config, mountPath: /etc/coredns/}, {name: custom, mountPath: /etc/coredns/custom}]}]
      volumes: [{name: config, configMap: {name: coredns}}, {name: custom, configMap: {name: coredns-custom}}]
`
	write(t, "dns.yaml", config)
	if s := readAll(t, "."); s.DNS == nil || !strings.Contains(s.DNS.Left, "there is no Deployment kube-system/coredns") {
		t.Errorf("DNS %+v", s.DNS)
	}
	write(t, "dns.yaml", config+deployment)
	if s := readAll(t, "."); s.DNS == nil || !strings.Contains(s.DNS.Left, "the ConfigMap coredns-custom, which is not there") || len(s.Workloads) != 1 {
		t.Errorf("DNS %+v, workloads %v", s.DNS, s.Workloads)
	}
	write(t, "dns.yaml", config+deployment+custom)
	s := readAll(t, ".")
	if s.DNS == nil || s.DNS.Left != "" || len(s.DNS.Forwards) != 2 || s.DNS.Forwards[1].To[0].Address.String() != "192.0.2.9:53" || len(s.Ignored) > 0 {
		t.Errorf("DNS %+v, ignored %v", s.DNS, s.Ignored)
	}
}

// That of ip-masq-agent is read, too; one that is malformed leaves what was said before.
func TestMasqueradeOfAFolder(t *testing.T) {
	t.Chdir(t.TempDir())
	const config = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: ip-masq-agent, namespace: kube-system}\ndata:\n  config: |\n    nonMasqueradeCIDRs: [10.0.0.0/8]\n"
	write(t, "masq.yaml", config)
	s := readAll(t, ".")
	if s.Masquerade == nil || len(s.Masquerade.Not) != 1 || len(s.Problems) > 0 || s.Unread > 0 {
		t.Errorf("masquerade %+v, problems %v", s.Masquerade, s.Problems)
	}
	write(t, "masq.yaml", strings.ReplaceAll(config, "10.0.0.0/8", "10.0.0.0/99"))
	if s = readAll(t, "."); s.Masquerade != nil || s.Unread != 1 || len(s.Problems) != 1 || !strings.HasPrefix(s.Problems[0].Error(), "masq.yaml:5: ConfigMap kube-system/ip-masq-agent: data.config") {
		t.Errorf("masquerade %+v, unread %d, problems %v", s.Masquerade, s.Unread, s.Problems)
	}
}
