package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// traced is a client on one node, and on another a pod with two servers: one answers,
// one never accepts. A Service is in front of both.
const traced = `
apiVersion: v1
kind: Namespace
metadata: {name: traced}
---
apiVersion: v1
kind: Service
metadata: {name: shop, namespace: traced}
spec:
  selector: {app: server}
  ports: [{name: web, port: 80, targetPort: 8080}, {name: deaf, port: 90, targetPort: 9090}]
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: traced, labels: {app: server}}
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 0
  containers:
    - {name: web, image: "AGNHOST", imagePullPolicy: Never, args: [netexec, "--udp-port=-1"]}
    - {name: deaf, image: "AGNHOST", imagePullPolicy: Never, command: [sh, -c, 'sleep 100000 | nc -l -k 9090 >/dev/null']}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: traced}
spec:
  nodeName: node-1
  terminationGracePeriodSeconds: 0
  containers: [{name: client, image: "AGNHOST", imagePullPolicy: Never, command: [sleep, "100000"]}]
`

const (
	caller1 = node(1)
	server2 = node(2)
)

// verdictText is what is looked at of a verdict of `millrace trace -o json`.
type verdictText struct {
	Cause, Title, Fix string
	Where             struct{ Node, Namespace, Pod string }
	Tuple             *struct {
		SourceName      string `json:"source_name"`
		DestinationName string `json:"destination_name"`
	}
}

// A pod calls another node's pod through a Service, and the packets die: of the other
// node's table of connections, of a program that does not accept, of a route. Each is
// named, with the pods' names, and nothing else is; while all is well nothing is.
func TestInstalledTraceNamesTheCause(t *testing.T) {
	needsInstalled(t)
	remove := func() {
		_ = exec.Command(folder+"/kubectl", "delete", "namespace", "traced", "--ignore-not-found").Run()
	}
	remove()
	t.Cleanup(remove)
	applyWithAgnhost(t, traced)
	kubectlOf(t, "-n", "traced", "wait", "--for=condition=Ready", "pod", "--all", "--timeout=1m")
	server := strings.TrimSpace(kubectlOf(t, "-n", "traced", "get", "pod", "server", "-o", "jsonpath={.status.podIP}"))
	err := until(t.Context(), "the client to reach the server", time.Minute, func() error {
		return exec.Command(folder+"/kubectl", callOnce(80)...).Run()
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("nothing", func(t *testing.T) {
		if all := trace(t, 80); len(all) > 0 {
			t.Errorf("nothing is wrong, and named is %+v", all)
		}
	})
	t.Run("route", func(t *testing.T) {
		route := strings.TrimSpace(on(t, server2, "ip -4 route show "+server))
		on(t, server2, "ip route replace blackhole "+server)
		t.Cleanup(func() { on(t, server2, "ip route del blackhole "+server+"; ip route replace "+route) })
		named(t, trace(t, 80), "route-blackhole", func(v verdictText) error {
			return errors.Join(contains("namespace", v.Where.Namespace, server2.name()), contains("fix", v.Fix, server))
		})
	})
	t.Run("nodes", func(t *testing.T) {
		route := strings.TrimSpace(on(t, server2, "ip -4 route show "+server))
		on(t, server2, "ip route replace blackhole "+server)
		t.Cleanup(func() { on(t, server2, "ip route del blackhole "+server+"; ip route replace "+route) })
		// From where the API server is reached, as from somebody's laptop.
		all := traceWhile(t, 80, exec.Command("nsenter", "--net=/run/netns/"+control, program(t), "trace", "traced/client", "traced/server",
			"--nodes", "all", "--source", "kube:"+kubeconfig, "--for", "8s", "-o", "json"))
		named(t, all, "route-blackhole", func(v verdictText) error {
			return contains("node", v.Where.Node, server2.name())
		})
	})
	t.Run("conntrack", func(t *testing.T) {
		on(t, server2, "nft 'add table inet guarded; add chain inet guarded f { type filter hook forward priority 0; }; add rule inet guarded f ct state established accept'")
		t.Cleanup(func() { on(t, server2, "nft delete table inet guarded; conntrack -F 2>/dev/null") })
		fillConntrack(t, server2)
		named(t, trace(t, 80), "conntrack-table-full", func(v verdictText) error {
			return contains("namespace", v.Where.Namespace, server2.name())
		})
	})
	// The last: its clients come again and again.
	t.Run("listener", func(t *testing.T) {
		named(t, trace(t, 90), "accept-queue-full", func(v verdictText) error {
			return contains("pod", v.Where.Pod, "traced/server")
		})
	})
}

// applyWithAgnhost applies a manifest with the image that the end-to-end tests have.
func applyWithAgnhost(t *testing.T, manifest string) {
	t.Helper()
	number, err := filepath.Glob(filepath.Join(root, cacheFolder, "bin", "*", "agnhost.version"))
	if err != nil || len(number) != 1 {
		t.Fatalf("find the version of agnhost: %q, %v", number, err)
	}
	tag := strings.TrimSpace(string(read(t, number[0])))
	if err := applyText(strings.ReplaceAll(manifest, "AGNHOST", "registry.k8s.io/e2e-test-images/agnhost:"+tag)); err != nil {
		t.Fatal(err)
	}
}

// callOnce asks the Service at a port from inside the client, for two seconds.
func callOnce(port int) []string {
	return []string{"-n", "traced", "exec", "client", "--", "nc", "-z", "-w", "2",
		"shop.traced.svc.cluster.local", fmt.Sprint(port)}
}

// trace looks at what is between the two pods on all of this machine, nodes and pods,
// while the client calls, and returns the verdicts.
func trace(t *testing.T, port int) []verdictText {
	t.Helper()
	// The API server is not reached from where all namespaces of the nodes are seen.
	cluster := filepath.Join(t.TempDir(), "cluster.yaml")
	objects := kubectlOf(t, "get", "pods,services,endpointslices,nodes", "--all-namespaces", "-o", "yaml")
	if err := os.WriteFile(cluster, []byte(objects), 0o600); err != nil {
		t.Fatal(err)
	}
	return traceWhile(t, port, exec.Command(program(t), "trace", "traced/client", "traced/server", "--source", "dir:"+cluster, "--for", "8s", "-o", "json"))
}

// program is millrace, as it is in the image.
func program(t *testing.T) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join(root, "dist", "millrace-"+runtime.GOARCH))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// traceWhile runs a trace while the client calls.
func traceWhile(t *testing.T, port int, command *exec.Cmd) []verdictText {
	t.Helper()
	command.Stderr = os.Stderr
	stop := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		loop := exec.Command(folder+"/kubectl", "-n", "traced", "exec", "client", "--", "sh", "-c",
			fmt.Sprintf("for i in 1 2 3 4 5 6 7 8 9 10 11 12; do (for j in 1 2 3 4; do sleep 9 | nc -w 9 shop.traced.svc.cluster.local %d >/dev/null 2>&1 & done; sleep 1); done", port))
		if loop.Start() != nil {
			return
		}
		<-stop
		_ = loop.Process.Kill()
		_ = loop.Wait()
	}()
	text, err := command.Output()
	close(stop)
	<-ended
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 2) {
		t.Fatalf("%v: %v", command, err)
	}
	var said struct{ Verdicts []verdictText }
	if err := json.Unmarshal(text, &said); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	for _, v := range said.Verdicts {
		t.Logf("%s: %s", v.Cause, v.Title)
	}
	return said.Verdicts
}

// named fails the test unless one cause is named, the wanted one, and it is right; and
// unless the pods are called by their names.
func named(t *testing.T, all []verdictText, cause string, right func(verdictText) error) {
	t.Helper()
	causes := []string{}
	for _, v := range all {
		causes = append(causes, v.Cause)
	}
	if !slices.Equal(causes, []string{cause}) {
		t.Fatalf("named are %v, want %s", causes, cause)
	}
	v := all[0]
	if err := right(v); err != nil {
		t.Error(err)
	}
	if v.Where.Pod == "traced/server" {
		return
	}
	// What dies first may be an answer.
	if v.Tuple == nil || !strings.Contains(v.Tuple.SourceName+v.Tuple.DestinationName, "pod traced/") {
		t.Errorf("the pods are not named: %+v %+v", v.Where, v.Tuple)
	}
}

func contains(what, text, part string) error {
	if !strings.Contains(text, part) {
		return fmt.Errorf("%s is %q, and should hold %q", what, text, part)
	}
	return nil
}

// fillConntrack fills a node's table with connections that are not given up for new
// ones, and keeps it full: the kernel clears away what else is in it, which is much
// after other tests.
func fillConntrack(t *testing.T, n node) {
	t.Helper()
	most := strings.TrimSpace(on(t, n, "cat /proc/sys/net/netfilter/nf_conntrack_max"))
	var count int
	if _, err := fmt.Sscan(most, &count); err != nil {
		t.Fatal(err)
	}
	if count > 1<<20 {
		t.Fatalf("nf_conntrack_max is %d: too many to fill", count)
	}
	write := func(name, server string, count int) string {
		file := filepath.Join(t.TempDir(), name)
		var entries strings.Builder
		for i := range count {
			fmt.Fprintf(&entries, "-A -p tcp -s 198.18.%d.%d -d %s --sport %d --dport 9 --state ESTABLISHED -u ASSURED,SEEN_REPLY -t 600\n",
				i>>8&255, i&255, server, 1024+i>>16)
		}
		if err := os.WriteFile(file, []byte(entries.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	on(t, n, "conntrack -R "+write("entries", "198.19.0.1", count)+" >/dev/null 2>&1 || true")
	more := write("more", "198.19.0.2", 5000) // until this is gone
	again := exec.Command(folder+"/node", strconv.Itoa(int(n)), "sh", "-c",
		fmt.Sprintf("while [ -e %[1]s ]; do conntrack -R %[1]s >/dev/null 2>&1; sleep 0.3; done", more))
	if err := again.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.Remove(more)
		_ = again.Wait()
	})
	count2 := strings.TrimSpace(on(t, n, "cat /proc/sys/net/netfilter/nf_conntrack_count"))
	t.Logf("%s of %s entries", count2, most)
}
