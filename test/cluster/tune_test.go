package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// proxyConfiguration is as kubeadm writes it, with what a person has added.
const proxyConfiguration = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables   # since the last upgrade
conntrack:
  maxPerCore: 1
  # the smallest node has 2 GB
  min: 1000 # ours
  tcpEstablishedTimeout: 48h
nodePortAddresses: null
`

// proxyBed is an API server with a kube-proxy's ConfigMap, and a node whose kube-proxy runs.
type proxyBed struct {
	*apiBed
	run, sysctls string
}

// What a kube-proxy sets is changed in its ConfigMap, one field and nothing else; put
// back; left to whoever altered it since, and to who keeps it; and it is said who may not.
func TestTuneOfARealConfigMap(t *testing.T) {
	b := &proxyBed{apiBed: newAPIBed(t)}
	b.run, b.sysctls = filepath.Join(b.folder, "tune"), filepath.Join(b.folder, "sys")
	b.proxyRuns()
	b.runsTextOfARealServer()
	b.refuses(0, "get ConfigMap kube-system/kube-proxy at https://127.0.0.1:6443: configmaps \"kube-proxy\" not found", "plan", "conntrack")
	b.create("")

	planned := b.tune(0, "plan", "conntrack")
	found := regexp.MustCompile(`~ conntrack\.min 1000 -> (\d+) \(ConfigMap kube-system/kube-proxy, conntrack\)\n    then     kubectl -n kube-system rollout restart daemonset kube-proxy\n`).FindStringSubmatch(planned)
	if found == nil || !strings.Contains(planned, "! net.netfilter.nf_conntrack_max 65536 -> "+found[1]+" (node, conntrack)\n    set by   kube-proxy (process ") {
		t.Fatalf("planned\n%s", planned)
	}
	t.Logf("planned\n%s", planned)
	n := found[1]
	changed := strings.Replace(proxyConfiguration, "min: 1000 #", "min: "+n+" #", 1)
	b.tune(0, "apply", "conntrack", "--dry-run")
	b.has(proxyConfiguration)

	// Set, told, and put back: byte by byte, and what others have written meanwhile stays.
	before := b.object()
	if said := b.tune(0, "apply", "conntrack"); said != "~ conntrack.min 1000 -> "+n+" (ConfigMap kube-system/kube-proxy, conntrack)\n" {
		t.Errorf("apply: %q", said)
	}
	b.has(changed)
	b.differsInTextAlone(before)
	if limit := string(read(t, filepath.Join(b.sysctls, "net/netfilter/nf_conntrack_max"))); limit != "65536\n" {
		t.Errorf("the node's own was set: %s", limit)
	}
	if said := b.tune(0, "status"); !regexp.MustCompile(`conntrack\.min +ConfigMap kube-system/kube-proxy +` + n + ` +1000 +conntrack `).MatchString(said) {
		t.Errorf("status: %s", said)
	}
	b.refuses(0, "nothing to change", "apply", "conntrack")
	b.write(strings.Replace(changed, "mode: nftables", "mode: iptables", 1))
	if said := b.tune(0, "undo", "conntrack", "--dry-run"); !strings.Contains(said, "- conntrack.min "+n+" -> 1000") {
		t.Errorf("undo: %s", said)
	}
	b.undoes("- conntrack.min " + n + " -> 1000 (ConfigMap kube-system/kube-proxy, conntrack)\n")
	b.has(strings.Replace(proxyConfiguration, "mode: nftables", "mode: iptables", 1))

	// A field is set if what kube-proxy makes of it is measured to help.
	b.write(proxyConfiguration)
	said, want := b.tune(0, "apply", "conntrack", "--prove", "--rounds", "6"), "~ conntrack.min 1000 -> "+n+" (ConfigMap kube-system/kube-proxy, conntrack)\n"
	if !strings.HasPrefix(said, "keeps: net.netfilter.nf_conntrack_max 65536 -> "+n+": 20 -> 200 connections") || !strings.HasSuffix(said, want) {
		t.Errorf("apply --prove:\n%s", said)
	}
	b.has(changed)
	b.undoes("- conntrack.min " + n + " -> 1000 (ConfigMap kube-system/kube-proxy, conntrack)\n")

	// What somebody alters is theirs.
	b.tune(0, "apply", "conntrack-idle", "conntrack", "PX-04")
	altered := strings.NewReplacer("min: "+n, "min: 5000").Replace(b.text())
	b.write(altered)
	b.refuses(2, "it was set to "+n+", and somebody has set it to 5000 since", "status")
	b.undoes(`- conntrack.min stays 5000: it was 1000 before millrace set it to ` + n + `, and somebody else has set it since (ConfigMap kube-system/kube-proxy, conntrack)
- conntrack.tcpEstablishedTimeout 24h0m0s -> 48h (ConfigMap kube-system/kube-proxy, conntrack-idle)
- nodePortAddresses ["0.0.0.0/0"] -> null (ConfigMap kube-system/kube-proxy, proxy-addresses)
`)
	b.has(strings.Replace(proxyConfiguration, "min: 1000", "min: 5000", 1))

	b.isLeftToOthers(n)
}

// proxyRuns has a node with settings of a kernel, and a process that is called kube-proxy.
func (b *proxyBed) proxyRuns() {
	b.t.Helper()
	program := filepath.Join(b.folder, "kube-proxy")
	sleep, err := exec.LookPath("sleep")
	b.want(err)
	b.must(exec.Command("cp", sleep, program))
	c := b.inside(program, "3600")
	b.want(c.Start())
	b.t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	for name, value := range map[string]string{"max": "65536", "buckets": "16384", "tcp_timeout_established": "432000", "count": "0"} {
		file := filepath.Join(b.sysctls, "net/netfilter/nf_conntrack_"+name)
		b.want(os.MkdirAll(filepath.Dir(file), 0o755))
		b.want(os.WriteFile(file, []byte(value+"\n"), 0o644))
	}
	b.want(b.kubectl("{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {type: NodePort, ports: [{port: 80}]}}", "create", "-f", "-"))
}

// runsTextOfARealServer runs the test of the package that reads and writes ConfigMaps.
func (b *proxyBed) runsTextOfARealServer() {
	b.t.Helper()
	program := filepath.Join(b.folder, "kube.test")
	if text, err := exec.Command("go", "-C", "../..", "test", "-c", "-o", program, "./source/kube").CombinedOutput(); err != nil {
		b.t.Fatalf("build the test: %v\n%s", err, text)
	}
	b.want(b.kubectl("", "create", "configmap", "text", "--from-literal=a=1"))
	c := b.inside(program, "-test.run", "^TestTextOfARealServer$", "-test.v")
	c.Env = append(os.Environ(), "MILLRACE_KUBECONFIG="+b.folder+"/admin")
	if text, err := c.CombinedOutput(); err != nil || !strings.Contains(string(text), "--- PASS: TestTextOfARealServer") {
		b.t.Errorf("%v\n%s", err, text)
	}
}

// create makes the ConfigMap anew, with more of its metadata.
func (b *proxyBed) create(metadata string) {
	b.t.Helper()
	b.want(b.kubectl("", "-n", "kube-system", "delete", "configmap", "kube-proxy", "--ignore-not-found"))
	data, err := json.Marshal(map[string]string{"config.conf": proxyConfiguration, "kubeconfig.conf": "apiVersion: v1\n"})
	b.want(err)
	b.want(b.kubectl(fmt.Sprintf("{apiVersion: v1, kind: ConfigMap, metadata: {name: kube-proxy, namespace: kube-system%s}, data: %s}", metadata, data), "create", "-f", "-"))
}

// object is the ConfigMap as the API server has it.
func (b *proxyBed) object() (m map[string]any) {
	b.t.Helper()
	text, err := b.inside(filepath.Join(b.bin, "kubectl"), "--kubeconfig", b.folder+"/admin", "-n", "kube-system", "get", "configmap", "kube-proxy", "-o", "json", "--show-managed-fields").Output()
	b.want(err)
	decode(b.t, text, &m)
	return m
}

func (b *proxyBed) text() string {
	b.t.Helper()
	return b.object()["data"].(map[string]any)["config.conf"].(string)
}

func (b *proxyBed) has(want string) {
	b.t.Helper()
	if got := b.text(); got != want {
		b.t.Errorf("the ConfigMap has\n%s\nwant\n%s", got, want)
	}
}

// write is somebody else who changes the configuration.
func (b *proxyBed) write(text string) {
	b.t.Helper()
	patch, err := json.Marshal(map[string]any{"data": map[string]string{"config.conf": text}})
	b.want(err)
	b.want(b.kubectl("", "-n", "kube-system", "patch", "configmap", "kube-proxy", "--type=merge", "-p", string(patch)))
}

// differsInTextAlone checks that nothing else of the object was changed, and that it is
// said who did it.
func (b *proxyBed) differsInTextAlone(before map[string]any) {
	b.t.Helper()
	after := b.object()
	if fields := fmt.Sprint(after["metadata"].(map[string]any)["managedFields"]); !strings.Contains(fields, "manager:kubectl-create") || !strings.Contains(fields, "manager:millrace") {
		b.t.Errorf("its fields are managed by %s", fields)
	}
	for _, m := range []map[string]any{before, after} {
		about := m["metadata"].(map[string]any)
		delete(about, "resourceVersion")
		delete(about, "managedFields")
		delete(m["data"].(map[string]any), "config.conf")
	}
	if one, other := fmt.Sprint(before), fmt.Sprint(after); one != other {
		b.t.Errorf("it was\n%s\nand is\n%s", one, other)
	}
}

// as runs `millrace tune` with somebody's kubeconfig.
func (b *proxyBed) as(user string, words ...string) (stdout, stderr string, status int) {
	b.t.Helper()
	words = append([]string{b.millrace, "tune"}, words...)
	words = append(words, "--run", b.run, "--proc-sys", b.sysctls)
	if words[2] == "plan" || words[2] == "apply" {
		words = append(words, "--for", "0s")
	}
	if user != "" {
		words = append(words, "--source", "kube:"+b.folder+"/"+user)
	}
	// In the namespace alone: `ip netns exec` would hide the cgroups, which a proof needs.
	c := exec.Command("nsenter", append([]string{"--net=/run/netns/" + b.space}, words...)...)
	var out, errs strings.Builder
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil && c.ProcessState == nil {
		b.t.Fatal(err)
	}
	return out.String(), errs.String(), c.ProcessState.ExitCode()
}

func (b *proxyBed) tune(want int, words ...string) string {
	b.t.Helper()
	stdout, stderr, status := b.as("admin", words...)
	if status != want {
		b.t.Fatalf("tune %s: exit status %d, not %d: %s%s", strings.Join(words, " "), status, want, stdout, stderr)
	}
	if words[0] == "apply" && len(words) == 2 && !strings.Contains(stderr, "each kube-proxy has it when it starts again: kubectl -n kube-system rollout restart daemonset kube-proxy") {
		b.t.Errorf("it is not said what is to be done then: %q", stderr)
	}
	return stdout
}

func (b *proxyBed) refuses(want int, says string, words ...string) {
	b.t.Helper()
	stdout, stderr, status := b.as("admin", words...)
	if status != want || !strings.Contains(stdout+stderr, says) {
		b.t.Errorf("tune %s: exit status %d, not %d: %s%s; want %q", strings.Join(words, " "), status, want, stdout, stderr, says)
	}
}

// undoes all, without being told where the cluster is: that is written down.
func (b *proxyBed) undoes(want string) {
	b.t.Helper()
	stdout, stderr, status := b.as("", "undo", "--all")
	if status != 0 || stdout != want {
		b.t.Errorf("undo: exit status %d: %s\n%s\nwant\n%s", status, stderr, stdout, want)
	}
	if _, err := os.Stat(b.run); !os.IsNotExist(err) {
		b.t.Errorf("the folder is left: %v", err)
	}
}

// isLeftToOthers: what a tool keeps, what may not be read or written, an object that was
// made anew.
func (b *proxyBed) isLeftToOthers(n string) {
	b.t.Helper()
	refused := func(user, says string) {
		b.t.Helper()
		stdout, stderr, status := b.as(user, "apply", "conntrack")
		if status == 0 || stdout != "" || !strings.Contains(stderr, says) {
			b.t.Errorf("apply of %s: exit status %d: %s%s; want %q", user, status, stdout, stderr, says)
		}
		b.t.Logf("%s: %s", user, strings.TrimSpace(stderr))
		if _, err := os.Stat(b.run); !os.IsNotExist(err) {
			b.t.Errorf("something is written down: %v", err)
		}
	}
	for metadata, says := range map[string]string{
		", annotations: {argocd.argoproj.io/tracking-id: x}":                                                         "is set by Argo CD (annotation argocd.argoproj.io/tracking-id: x): it would put back what is set here: change conntrack.min to " + n + " in the repository",
		", labels: {helm.toolkit.fluxcd.io/name: net}":                                                               "is set by Flux (label helm.toolkit.fluxcd.io/name: net)",
		", ownerReferences: [{apiVersion: v1, kind: Addon, name: proxy, uid: 0a0a0a0a-0000-0000-0000-000000000000}]": "is set by Addon proxy, which owns it (ownerReferences)",
	} {
		b.create(metadata)
		refused("admin", says)
		b.has(proxyConfiguration)
	}
	b.create("")
	data, err := json.Marshal(map[string]string{"config.conf": proxyConfiguration})
	b.want(err)
	b.want(b.kubectl(fmt.Sprintf("{apiVersion: v1, kind: ConfigMap, metadata: {name: kube-proxy, namespace: kube-system}, data: %s}", data),
		"apply", "--server-side", "--force-conflicts", "--field-manager=rancher", "-f", "-"))
	refused("admin", "is set by rancher, which applies it (managedFields)")
	b.create("")
	refused("nobody", "it takes the verb get for configmaps in kube-system: ask who gives out roles in this cluster")
	b.want(b.kubectl("", "-n", "kube-system", "create", "role", "looks", "--verb=get", "--resource=configmaps"))
	b.want(b.kubectl("", "-n", "kube-system", "create", "rolebinding", "looks", "--role=looks", "--user=nobody"))
	refused("nobody", "it takes the verb patch for configmaps in kube-system: ask who gives out roles in this cluster")
	b.has(proxyConfiguration)
	b.tune(0, "apply", "conntrack")
	b.create("")
	b.refuses(1, "this leads to another cluster now, or its object was made anew or has gone: what was set stays written down", "undo", "--all")
	b.has(proxyConfiguration)
}
