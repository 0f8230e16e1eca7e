package kube

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/kube/kubetest"
)

const configMap = `
apiVersion: v1
kind: ConfigMap
metadata: {name: kube-proxy, namespace: kube-system}
data: {config.conf: "kind: KubeProxyConfiguration"}
---
`

// A server that is away leaves the next one to be asked; one that answers decides,
// and somebody who may wait is told that from somebody who may not.
func TestConfigMap(t *testing.T) {
	b := newBed(t)
	b.apply(configMap)
	get := func(name, key string, servers ...string) (string, error) {
		data, err := ConfigMap(t.Context(), Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: servers}, "kube-system", name, key)
		return string(data), err
	}
	if text, err := get("kube-proxy", "config.conf", "http://127.0.0.1:1", b.url); err != nil || text != "kind: KubeProxyConfiguration" {
		t.Errorf("%q, %v", text, err)
	}
	for want, ask := range map[string]func() (string, error){
		"get ConfigMap kube-system/absent at " + b.url + ": ":                                        func() (string, error) { return get("absent", "config.conf", b.url) },
		"get ConfigMap kube-system/kube-proxy at " + b.url + ": kubeconfig.conf: it has no such key": func() (string, error) { return get("kube-proxy", "kubeconfig.conf", b.url) },
	} {
		if _, err := ask(); err == nil || errors.Is(err, ErrNoAnswer) || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if _, err := get("kube-proxy", "config.conf", "http://127.0.0.1:1"); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody there: %v", err)
	}
	code, reason := http.StatusForbidden, metav1.StatusReasonForbidden
	b.Fault(func(w http.ResponseWriter, _ *http.Request) bool {
		kubetest.Refuse(w, code, reason, "no")
		return true
	})
	if _, err := get("kube-proxy", "config.conf", b.url); err == nil || errors.Is(err, ErrNoAnswer) {
		t.Errorf("forbidden: %v", err)
	}
	code, reason = http.StatusInternalServerError, metav1.StatusReasonInternalError
	if _, err := get("kube-proxy", "config.conf", b.url); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("a server that is not well: %v", err)
	}
}

const corefileMap = `---
apiVersion: v1
kind: ConfigMap
metadata: {name: coredns, namespace: kube-system}
data:
  Corefile: |
    .:53 {
        kubernetes cluster.local
        forward . 192.0.2.53
    }
`

// namesBed is a bed whose Source asks for names.
func namesBed(t *testing.T) *bed {
	b := newBed(t)
	var err error
	b.source, err = Open(Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: []string{b.url}, Node: "n1", Names: true})
	if err != nil {
		t.Fatal(err)
	}
	b.apply(nodes + service("web", "10.96.0.2"))
	return b
}

// The Corefile comes with the Services, and so do its changes; other ConfigMaps are
// nobody's concern.
func TestCorefileIsFollowed(t *testing.T) {
	b := namesBed(t)
	b.apply(configMap)
	b.run()
	left := func(part string) func(*model.Snapshot) bool {
		return func(s *model.Snapshot) bool {
			return s.Complete && s.DNS != nil && strings.Contains(s.DNS.Left, part) && (part != "" || s.DNS.Left == "")
		}
	}
	b.until("without a ConfigMap nothing is known", left("there is no ConfigMap kube-system/coredns"))
	b.apply(corefileMap)
	s := b.until("the Corefile is read", left(""))
	if f := s.DNS.Forwards; s.DNS.Zone != "cluster.local" || len(f) != 2 || f[1].To[0].Address.String() != "192.0.2.53:53" {
		t.Errorf("read %+v", s.DNS)
	}
	b.apply(strings.ReplaceAll(corefileMap, "kubernetes cluster.local", "hosts"))
	b.until("a change comes", left("kubernetes is not in it"))
	b.apply(strings.ReplaceAll(corefileMap, "Corefile: |", "NodeHosts: |"))
	b.until("a ConfigMap without a Corefile", left("has no Corefile"))
	if err := b.Remove(corefileMap); err != nil {
		t.Fatal(err)
	}
	b.until("it is gone", left("there is no ConfigMap"))
}

// customMap is what users of k3s, AKS and Gardener write, and corednsDeployment what mounts it.
const (
	customMap = `---
apiVersion: v1
kind: ConfigMap
metadata: {name: coredns-custom, namespace: kube-system}
data:
  corp.server: |
    corp.example:53 {
        forward . 192.0.2.77
    }
`
	corednsDeployment = `---
apiVersion: apps/v1
kind: Deployment
metadata: {name: coredns, namespace: kube-system}
spec:
  replicas: 2
  selector: {matchLabels: {k8s-app: kube-dns}}
  template:
    metadata: {labels: {k8s-app: kube-dns}}
    spec:
      containers:
      - name: coredns
        image: coredns
        args: [-conf, /etc/coredns/Corefile]
        volumeMounts:
        - {name: config-volume, mountPath: /etc/coredns, readOnly: true}
        - {name: custom-config-volume, mountPath: /etc/coredns/custom, readOnly: true}
      volumes:
      - name: config-volume
        configMap: {name: coredns, items: [{key: Corefile, path: Corefile}]}
      - name: custom-config-volume
        configMap: {name: coredns-custom, optional: true}
`
)

// importing is a Corefile that imports what users write.
var importing = strings.ReplaceAll(corefileMap, "        forward . 192.0.2.53\n    }\n", "        forward . 192.0.2.53\n        import custom/*.override\n    }\n    import custom/*.server\n")

// What the Corefile imports is read with it, where the Deployment says that it is, as soon as
// that is known; and so are its changes.
func TestImportsAreFollowed(t *testing.T) {
	b := namesBed(t)
	b.apply(importing + customMap)
	b.run()
	left := func(part string) func(*model.Snapshot) bool {
		return func(s *model.Snapshot) bool {
			return s.Complete && s.DNS != nil && strings.Contains(s.DNS.Left, part) && (part != "" || s.DNS.Left == "")
		}
	}
	stub := func(want string) func(*model.Snapshot) bool {
		return func(s *model.Snapshot) bool {
			return left("")(s) && (want == "") == (len(s.DNS.Forwards) == 2) && (want == "" || s.DNS.Forwards[1].Zone == want)
		}
	}
	b.until("nobody says where the files are from", left("brings: there is no Deployment kube-system/coredns"))
	b.apply(corednsDeployment)
	b.until("the Deployment says it", stub("corp.example"))
	b.apply(strings.ReplaceAll(customMap, "corp.example", "lab.example"))
	b.until("a change comes", stub("lab.example"))
	b.apply(strings.ReplaceAll(customMap, "corp.server: |\n    corp.example:53 {\n        forward . 192.0.2.77\n    }", "x.override: |\n    rewrite name regex a b"))
	b.until("a rewrite of all", left("coredns-custom/x.override:1: rewrite"))
	if err := b.Remove(customMap); err != nil {
		t.Fatal(err)
	}
	b.until("it may be missing", stub(""))
	b.apply(strings.ReplaceAll(corednsDeployment, "configMap: {name: coredns-custom, optional: true}", "emptyDir: {}"))
	b.until("it is written by somebody else now", left("/etc/coredns/custom is an emptyDir"))
	if err := b.Remove(corednsDeployment); err != nil {
		t.Fatal(err)
	}
	b.until("the Deployment is gone", left("there is no Deployment"))
}

// The table of k3s is a key beside the Corefile: its names come and go with the nodes.
func TestHostsAreFollowed(t *testing.T) {
	b := namesBed(t)
	table := strings.ReplaceAll(corefileMap, "        forward .", "        hosts /etc/coredns/NodeHosts {\n            ttl 60\n            reload 15s\n            fallthrough\n        }\n        forward .") + "  NodeHosts: |\n    192.0.2.21 server-0\n"
	b.apply(table + strings.ReplaceAll(corednsDeployment, "path: Corefile}", "path: Corefile}, {key: NodeHosts, path: NodeHosts}"))
	b.run()
	has := func(want ...string) func(*model.Snapshot) bool {
		return func(s *model.Snapshot) bool {
			return s.Complete && s.DNS != nil && s.DNS.Left == "" && slices.Equal(s.DNS.Hosts, want)
		}
	}
	b.until("the table is read", has("server-0"))
	b.apply(table + "    192.0.2.22 agent-0\n")
	b.until("a node comes", has("agent-0", "server-0"))
	b.apply(corednsDeployment)
	b.until("it is not mounted any more: CoreDNS has no such file", has())
}

// Who may not read what is imported, or the Deployment, has complete Snapshots, which say
// that; a Corefile that imports nothing is in force all the same.
func TestImportsMayNotBeRead(t *testing.T) {
	for forbidden, want := range map[string]string{
		"/deployments":                   "the Deployment kube-system/coredns cannot be read",
		"metadata.name%3Dcoredns-custom": "the ConfigMap kube-system/coredns-custom cannot be read",
	} {
		b := namesBed(t)
		b.apply(importing + customMap + corednsDeployment)
		b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasSuffix(r.URL.Path, forbidden) && !strings.Contains(r.URL.RawQuery, forbidden) {
				return false
			}
			kubetest.Refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, "forbidden")
			return true
		})
		b.run()
		b.until("the Services are there, and why the Corefile is left", func(s *model.Snapshot) bool {
			return s.Complete && len(s.Services) > 0 && s.DNS != nil && strings.Contains(s.DNS.Left, want) && strings.Contains(s.DNS.Left, "forbidden")
		})
		b.apply(corefileMap)
		b.until("a Corefile that imports nothing", func(s *model.Snapshot) bool { return s.DNS.Left == "" })
		b.apply(importing)
		b.Fault(nil)
		b.until("it may be read", func(s *model.Snapshot) bool { return s.DNS.Left == "" && len(s.DNS.Forwards) == 3 })
		b.end()
	}
}

const masqueradeMap = `---
apiVersion: v1
kind: ConfigMap
metadata: {name: ip-masq-agent, namespace: kube-system}
data:
  config: |
    nonMasqueradeCIDRs: [172.16.0.0/12]
`

// masqueradeBed is a bed whose Source asks for names, and for what is masqueraded.
func masqueradeBed(t *testing.T) *bed {
	b := newBed(t)
	var err error
	b.source, err = Open(Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: []string{b.url}, Node: "n1", Names: true, Masquerade: true})
	if err != nil {
		t.Fatal(err)
	}
	b.apply(nodes + service("web", "10.96.0.2"))
	return b
}

// The configuration of ip-masq-agent comes beside that of CoreDNS, changes, and goes; one
// that is malformed is told and changes nothing.
func TestMasqueradeIsFollowed(t *testing.T) {
	b := masqueradeBed(t)
	b.apply(corefileMap)
	b.run()
	says := func(want string) func(*model.Snapshot) bool {
		return func(s *model.Snapshot) bool {
			if !s.Complete || s.DNS == nil || s.DNS.Left != "" {
				return false
			}
			return s.Masquerade == nil && want == "" || s.Masquerade != nil && fmt.Sprint(s.Masquerade.Not) == want
		}
	}
	b.until("nobody says anything", says(""))
	b.apply(masqueradeMap)
	b.until("it is read", says("[172.16.0.0/12]"))
	b.apply(strings.ReplaceAll(masqueradeMap, "172.16.0.0/12", "10.0.0.0/8"))
	b.until("a change comes", says("[10.0.0.0/8]"))
	b.apply(strings.ReplaceAll(masqueradeMap, "172.16.0.0/12", "10.0.0.0"))
	b.until("a malformed one is told, and the last stays", func(s *model.Snapshot) bool {
		return says("[10.0.0.0/8]")(s) && len(s.Problems) == 1 && strings.Contains(s.Problems[0].Error(), "ConfigMap kube-system/ip-masq-agent: data.config: nonMasqueradeCIDRs[0]")
	})
	if err := b.Remove(masqueradeMap); err != nil {
		t.Fatal(err)
	}
	b.until("it is gone, and the Corefile is not", says(""))
}

// Who may not read it goes on without, and says so.
func TestMasqueradeMayNotBeRead(t *testing.T) {
	b := masqueradeBed(t)
	b.apply(masqueradeMap)
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.RawQuery, "ip-masq-agent") {
			return false
		}
		kubetest.Refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, "configmaps is forbidden")
		return true
	})
	b.run()
	b.until("the rest is there, and why this is not", func(s *model.Snapshot) bool {
		return s.Complete && len(s.Services) > 0 && s.Masquerade == nil && len(s.Problems) == 1 &&
			strings.HasPrefix(s.Problems[0].Error(), "kube configmaps kube-system/ip-masq-agent: cannot be followed") && strings.Contains(s.Problems[0].Text, "forbidden")
	})
	b.Fault(nil)
	b.until("it may be read", func(s *model.Snapshot) bool { return s.Masquerade != nil })
}

// Who may not read the ConfigMap has complete Snapshots, which say that.
func TestCorefileMayNotBeRead(t *testing.T) {
	b := namesBed(t)
	b.apply(corefileMap)
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, "/configmaps") {
			return false
		}
		kubetest.Refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, "configmaps is forbidden")
		return true
	})
	b.run()
	b.until("the Services are there, and why the Corefile is not", func(s *model.Snapshot) bool {
		return s.Complete && len(s.Services) > 0 && s.DNS != nil &&
			strings.Contains(s.DNS.Left, "kube-system/coredns cannot be read") && strings.Contains(s.DNS.Left, "forbidden")
	})
	b.Fault(nil)
	b.until("it may be read", func(s *model.Snapshot) bool { return s.DNS != nil && s.DNS.Left == "" })
}
