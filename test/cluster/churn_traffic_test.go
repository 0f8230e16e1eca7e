package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

var kinds = []string{"tcp", "tcp-long", "udp", "udp-long"}

// churned are the Services that are called all the time.
var churned = []struct {
	name, app string
	number    int // the last of its addresses
	nodePort  int // 0 for none
	more      string
}{
	{"stable", "stable", 1, 30701, ""},
	{"local", "stable", 2, 30702, "  externalTrafficPolicy: Local\n"},
	{"altered", "stable", 3, 0, ""},
	{"manual", "", 4, 0, ""},
	{"graceful", "graceful", 5, 30705, ""},
	{"sticky", "graceful", 6, 30706, "  sessionAffinity: ClientIP\n"},
	{"abrupt", "abrupt", 7, 30707, ""},
}

// serviceText is a Service for both protocols at port 80.
func serviceText(name, app, v4, v6 string, nodePort int, more string) string {
	kind, at, policy, addresses := "ClusterIP", "", "SingleStack", `"`+v4+`"`
	if nodePort != 0 {
		kind, at = "NodePort", fmt.Sprintf(", nodePort: %d", nodePort)
	}
	if v6 != "" {
		policy, addresses = "RequireDualStack", addresses+`, "`+v6+`"`
	}
	if app != "" {
		more += "  selector: {app: " + app + "}\n"
	}
	return fmt.Sprintf(`---
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: churn}
spec:
  type: %s
  clusterIP: %s
  clusterIPs: [%s]
  ipFamilyPolicy: %s
%s  ports:
    - {name: t, port: 80, targetPort: 8080, protocol: TCP%s}
    - {name: u, port: 80, targetPort: 8080, protocol: UDP%s}
`, name, kind, v4, addresses, policy, more, at, at)
}

// serversText is a set of pods that serve.
func serversText(kind, name, more string) string {
	return fmt.Sprintf(`---
apiVersion: apps/v1
kind: %[1]s
metadata: {name: %[2]s, namespace: churn}
spec:
%[3]s  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}}
    spec:
      terminationGracePeriodSeconds: 20
      containers: [{name: serve, image: "%[4]s", imagePullPolicy: Never, args: [serve, "--linger=10s"],
        readinessProbe: {httpGet: {port: 8081, path: /ready}, periodSeconds: 1, timeoutSeconds: 3}}]
`, kind, name, more, callsImage)
}

// callersText is a caller on each node.
func callersText(name, annotations string, targets []string) string {
	arguments, _ := json.Marshal(append([]string{"call"}, targets...)) // strings
	return fmt.Sprintf(`---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: %[1]s, namespace: churn}
spec:
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}, annotations: {%s}}
    spec:
      terminationGracePeriodSeconds: 0
      containers: [{name: call, image: "%s", imagePullPolicy: Never, args: %s}]
`, name, annotations, callsImage, arguments)
}

func clusterIPs(number int) (v4, v6 string) {
	return fmt.Sprintf("10.96.77.%d", number), fmt.Sprintf("fd00:10:96::4d%02d", number)
}

// targetsAt are all kinds of calls of one Service at addresses.
func targetsAt(name string, port int, addresses ...string) (all []string) {
	for _, kind := range kinds {
		for _, address := range addresses {
			all = append(all, name+"/"+kind+"="+net.JoinHostPort(address, fmt.Sprint(port)))
		}
	}
	return all
}

// outside is the name of the caller outside the cluster.
const outside = "outside"

// caller is one program that calls, and what it said.
type caller struct {
	name string
	read func() (string, error)
}

// open starts the servers, and who calls them: pods that are served at the socket and
// packet by packet, the nodes, and somebody outside by each node's node ports.
func (c *churn) open() {
	remove := func() {
		_ = exec.Command(folder+"/kubectl", "delete", "namespace", "churn", "--ignore-not-found", "--timeout=1m").Run()
	}
	remove()
	c.t.Cleanup(remove)
	text := "apiVersion: v1\nkind: Namespace\nmetadata: {name: churn}\n" + serversText("DaemonSet", "stable", "") +
		serversText("Deployment", "graceful", "  replicas: 3\n") + serversText("Deployment", "abrupt", "  replicas: 4\n")
	var within, without []string
	for _, s := range churned {
		v4, v6 := clusterIPs(s.number)
		text += serviceText(s.name, s.app, v4, v6, s.nodePort, s.more)
		within = append(within, targetsAt(s.name, 80, v4, v6)...)
		for _, n := range allNodes() {
			if s.nodePort != 0 {
				without = append(without, targetsAt(s.name, s.nodePort, n.v4(), n.v6())...)
			}
		}
	}
	c.must(applyText(text))
	for _, of := range []string{"daemonset/stable", "deployment/graceful", "deployment/abrupt"} {
		kubectlOf(c.t, "-n", "churn", "rollout", "status", of, "--timeout=1m")
	}
	pods, err := podsOf("stable")
	c.must(err)
	c.must(writeSlices(pods))
	time.Sleep(time.Second)
	c.must(applyText(callersText("socket", "", within) + callersText("packet", "millrace.io/path: packet", within)))
	for _, of := range []string{"socket", "packet"} {
		kubectlOf(c.t, "-n", "churn", "rollout", "status", "daemonset/"+of, "--timeout=1m")
		pods, err := podsOf(of)
		c.must(err)
		for _, p := range pods {
			c.callers = append(c.callers, &caller{p.name + " on " + p.node, func() (string, error) { return ctl("logs", p.name) }})
		}
	}
	for _, n := range allNodes() {
		c.callFrom(n.name(), exec.Command(folder+"/node", append([]string{fmt.Sprint(int(n)), c.program(), "call", "--stdin"}, within...)...))
	}
	c.callFrom(outside, inside(control, c.program(), append([]string{"call", "--stdin"}, without...)...))
	c.settle()
}

func (c *churn) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// callFrom starts a caller that ends with this process at the latest.
func (c *churn) callFrom(name string, command *exec.Cmd) {
	file := filepath.Join(c.t.TempDir(), "calls")
	said, err := os.Create(file)
	c.must(err)
	command.Stdout, command.Stderr = said, said
	input, err := command.StdinPipe()
	c.must(err)
	c.must(command.Start())
	c.t.Cleanup(func() {
		input.Close()
		_ = command.Wait()
		said.Close()
	})
	c.callers = append(c.callers, &caller{name, func() (string, error) {
		text, err := os.ReadFile(file)
		return string(text), err
	}})
}

// settle waits until every target of every caller gets answers.
func (c *churn) settle() {
	for _, from := range c.callers {
		err := until(c.t.Context(), "answers to "+from.name, time.Minute, func() error {
			said, err := from.listen(time.Time{})
			if err != nil {
				return err
			}
			if last := said.last; last.At.IsZero() || last.SilentMS > 2000 {
				return fmt.Errorf("silent for %d ms: %s", last.SilentMS, last.Silent)
			}
			return nil
		})
		c.must(err)
	}
}

// failure and second are as the program calls writes them.
type failure struct {
	At                                        time.Time
	MS                                        int64
	Target, Kind, To, Endpoint, Server, Error string
	outside                                   bool // the cluster
}

func (f failure) String() string {
	return fmt.Sprintf("%s after %d ms: %s/%s=%s, endpoint %q, server %q: %s",
		f.At.Format("15:04:05.000"), f.MS, f.Target, f.Kind, f.To, f.Endpoint, f.Server, f.Error)
}

type second struct {
	At            time.Time
	Asked, Failed int
	SilentMS      int64 `json:"silent_ms"`
	Silent        string
}

// said is what a caller said since a moment.
type said struct {
	asked, failed int
	failures      []failure
	last          second
}

func (from *caller) listen(since time.Time) (s said, err error) {
	text, err := from.read()
	if err != nil {
		return s, err
	}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		var line struct {
			failure
			second
			At time.Time
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return s, fmt.Errorf("%s: %w: %s", from.name, err, lines.Text())
		}
		line.failure.At, line.second.At = line.At, line.At
		switch {
		case line.At.Before(since):
		case line.Error != "":
			line.failure.outside = from.name == outside
			s.failures = append(s.failures, line.failure)
		default:
			s.asked, s.failed, s.last = s.asked+line.Asked, s.failed+line.Failed, line.second
		}
	}
	return s, nil
}

func applyText(text string) error {
	apply := exec.Command(folder+"/kubectl", "apply", "-f", "-")
	apply.Stdin = strings.NewReader(text)
	_, err := output(apply)
	return err
}

// writeSlices are the endpoints of the Service manual.
func writeSlices(members []pod) error {
	text := ""
	for i, family := range []string{"IPv4", "IPv6"} {
		text += fmt.Sprintf(`---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: manual-%[2]d, namespace: churn, labels: {kubernetes.io/service-name: manual}}
addressType: %[1]s
ports: [{name: t, port: 8080, protocol: TCP}, {name: u, port: 8080, protocol: UDP}]
endpoints:
`, family, i)
		for _, p := range members {
			text += fmt.Sprintf("  - {addresses: [%q], nodeName: %s, conditions: {ready: true}}\n", p.addresses[i], p.node)
		}
	}
	return applyText(text)
}
