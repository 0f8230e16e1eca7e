package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// nodesReport is what is looked at of `millrace doctor --nodes`.
type nodesReport struct {
	Header struct {
		Nodes  []struct{ Name, Error, Kernel string }
		Unseen []string
	}
	Checks []nodesCheck
}

type nodesCheck struct {
	ID, Status, Title, Pitfall string
	Evidence                   []struct {
		Node, Scope, Read, Value, Severity string
		Unread                             bool
	}
}

// of is what a check came to, and on which nodes it found something.
func (r *nodesReport) of(t *testing.T, id string) (status string, found []string) {
	t.Helper()
	at := slices.IndexFunc(r.Checks, func(c nodesCheck) bool { return c.ID == id })
	if at < 0 {
		t.Fatalf("there is no %s", id)
	}
	for _, e := range r.Checks[at].Evidence {
		if e.Severity != "" && !slices.Contains(found, e.Node) {
			found = append(found, e.Node)
		}
	}
	return r.Checks[at].Status, found
}

// doctorFrom runs doctor where the API server is reached, as on somebody's laptop.
func doctorFrom(t *testing.T, words ...string) (r nodesReport, said string, status int) {
	t.Helper()
	command := exec.Command("nsenter", append([]string{"--net=/run/netns/" + control, program(t), "doctor"}, words...)...)
	command.Args = append(command.Args, "--source", "kube:"+kubeconfig, "-o", "json")
	var wrong strings.Builder
	command.Stderr = &wrong
	text, err := command.Output()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if len(text) > 0 {
		if err := json.Unmarshal(text, &r); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
	}
	return r, wrong.String(), command.ProcessState.ExitCode()
}

// All nodes are looked at from afar, by agents and without; what is wrong on some of them
// is told of those, and what they differ in; pods that were made for it are deleted, also
// where they were refused or killed.
func TestInstalledDoctorOfAllNodes(t *testing.T) {
	needsInstalled(t)
	names := []string{}
	for _, n := range allNodes() {
		names = append(names, n.name())
	}
	t.Run("agents", func(t *testing.T) { agentsLook(t, names) })
	t.Run("pods", func(t *testing.T) { podsLook(t, names) })
}

// breakNode makes node 2 differ from the others, and the last two have a finding.
func breakNode(t *testing.T) (wrong []string) {
	t.Helper()
	const local, queue = "/proc/sys/net/ipv4/conf/all/route_localnet", "/proc/sys/net/core/somaxconn"
	for _, n := range allNodes()[1:] {
		before := strings.TrimSpace(on(t, n, "cat "+local))
		on(t, n, "echo 1 >"+local)
		t.Cleanup(func() { on(t, n, "echo "+before+" >"+local) })
		wrong = append(wrong, n.name())
	}
	before := strings.TrimSpace(on(t, server2, "cat "+queue))
	on(t, server2, "echo 200 >"+queue)
	t.Cleanup(func() { on(t, server2, "echo "+before+" >"+queue) })
	return wrong
}

// judgeNodes is what every way to look at the nodes has to find.
func judgeNodes(t *testing.T, r nodesReport, names, wrong []string) {
	t.Helper()
	var answered []string
	for _, n := range r.Header.Nodes {
		if n.Error == "" && n.Kernel != "" {
			answered = append(answered, n.Name)
		}
	}
	if !slices.Equal(answered, names) {
		t.Errorf("answered have %q, not %q: %q", answered, names, r.Header.Unseen)
	}
	for id, want := range map[string][]string{"PX-16": wrong, "CN-25": {server2.name()}} {
		if status, found := r.of(t, id); status != "warn" || !slices.Equal(found, want) {
			t.Errorf("%s is %s on %q, not on %q", id, status, found, want)
		}
	}
	for _, c := range r.Checks {
		if c.Title == "" || c.Pitfall == "" {
			t.Errorf("%s has no title or no pitfall", c.ID)
		}
	}
}

// lacks are the checks that could not look on a node, and why.
func (r *nodesReport) lacks(node string) (all []string) {
	for _, c := range r.Checks {
		for _, e := range c.Evidence {
			if e.Unread && e.Node == node {
				all = append(all, c.ID+" "+e.Read+": "+e.Value)
			}
		}
	}
	return all
}

func agentsLook(t *testing.T, names []string) {
	wrong := breakNode(t)
	begun := time.Now()
	r, said, _ := doctorFrom(t, "--nodes", "all")
	t.Logf("%d nodes in %.1f s; not seen: %q", len(names), time.Since(begun).Seconds(), r.Header.Unseen)
	judgeNodes(t, r, names, wrong)
	if status, _ := r.of(t, "DN-02"); status == "skip" {
		t.Errorf("DN-02 is %s: the cluster's objects were not read: %s", status, said)
	}
	// The agent's container sees what the node itself does.
	text := on(t, server2, program(t)+" doctor -o json --for 1s || true")
	var there nodesReport
	if err := json.Unmarshal([]byte(text[strings.Index(text, "{"):]), &there); err != nil {
		t.Fatalf("%v: %.500s", err, text)
	}
	have, want := r.lacks(server2.name()), there.lacks("")
	t.Logf("lacks by the agent %d, on the node %d: %q", len(have), len(want), have)
	for _, lack := range have {
		if !slices.Contains(want, lack) {
			t.Errorf("the agent's container lacks what the node has: %s", lack)
		}
	}
	if r, _, status := doctorFrom(t, "--nodes", names[0], "--only", "HS-05", "--for", "0s"); len(r.Header.Nodes) != 1 || len(r.Checks) != 1 || status == 64 {
		t.Errorf("one node, one check: exit status %d, %+v", status, r)
	}
}

// doctorPods are the pods that were made to look.
func doctorPods(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(kubectlOf(t, "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=millrace-doctor", "-o", "name"))
}

func podsLook(t *testing.T, names []string) {
	image := strings.TrimSpace(kubectlOf(t, "-n", "kube-system", "get", "daemonset", "millrace", "-o", "jsonpath={.spec.template.spec.containers[0].image}"))
	restore := func() {
		_, _ = output(exec.Command(folder+"/kubectl", "apply", "-f", filepath.Join(root, millraceManifest)))
		_, _ = output(exec.Command(folder+"/kubectl", "-n", "kube-system", "rollout", "status", "daemonset/millrace", "--timeout=1m"))
	}
	t.Cleanup(restore)
	kubectlOf(t, "-n", "kube-system", "delete", "daemonset", "millrace", "--wait")
	err := until(t.Context(), "agents to end", time.Minute, func() error {
		if left := strings.TrimSpace(kubectlOf(t, "-n", "kube-system", "get", "pods", "-l", "app.kubernetes.io/name=millrace", "-o", "name")); left != "" {
			return errors.New(left)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, said, status := doctorFrom(t, "--nodes", "all"); status != 3 || !strings.Contains(said, names[0]+": no agent of millrace runs there") {
		t.Errorf("without agents: exit status %d, %s", status, said)
	}
	if _, said, status := doctorFrom(t, "pods", image); status != 64 || !strings.Contains(said, "nobody can be asked here") || doctorPods(t) != "" {
		t.Errorf("nobody has agreed: exit status %d, %s", status, said)
	}
	wrong := breakNode(t)
	begun := time.Now()
	r, said, _ := doctorFrom(t, "pods", image, "yes")
	t.Logf("%d nodes in %.1f s; not seen: %q; %s", len(names), time.Since(begun).Seconds(), r.Header.Unseen, said)
	judgeNodes(t, r, names, wrong)
	t.Logf("lacks: %q", r.lacks(server2.name()))
	noPods(t, "they were to look")
	// One image that nobody has.
	if _, said, status := doctorFrom(t, "pods", "registry.invalid/nothing:v0", "yes", "--nodes", names[0]); status != 3 || !strings.Contains(said, "ErrImagePull") && !strings.Contains(said, "ImagePullBackOff") {
		t.Errorf("no image: exit status %d, %s", status, said)
	}
	noPods(t, "their image is not there")
	refused(t, image, names[0])
	killed(t, image)
}

// noPods waits until those that were made are gone: the node takes a moment for it.
func noPods(t *testing.T, why string) {
	t.Helper()
	err := until(t.Context(), "pods to go after "+why, 20*time.Second, func() error {
		if left := doctorPods(t); left != "" {
			return fmt.Errorf("%s is there", left)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// refused is the namespace that admits less.
func refused(t *testing.T, image, name string) {
	const label = "pod-security.kubernetes.io/enforce"
	kubectlOf(t, "label", "namespace", "kube-system", label+"=baseline", "--overwrite")
	defer kubectlOf(t, "label", "namespace", "kube-system", label+"-")
	_, said, status := doctorFrom(t, "pods", image, "yes", "--nodes", name)
	t.Log(said)
	if status != 3 || !strings.Contains(said, "violates PodSecurity") || !strings.Contains(said, "admits pods of the level privileged") {
		t.Errorf("refused: exit status %d, %s", status, said)
	}
	noPods(t, "they were refused")
}

// killed is who is told to end while the pods look.
func killed(t *testing.T, image string) {
	command := exec.Command("nsenter", "--net=/run/netns/"+control, program(t), "doctor", "pods", image, "yes", "--for", "30s", "--source", "kube:"+kubeconfig)
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	err := until(t.Context(), "pods to be made", 20*time.Second, func() error {
		if doctorPods(t) == "" {
			return errors.New("there is none")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	_ = command.Process.Signal(os.Interrupt)
	if err := command.Wait(); err == nil || command.ProcessState.ExitCode() != 3 {
		t.Errorf("interrupted: exit status %d", command.ProcessState.ExitCode())
	}
	noPods(t, "their caller was interrupted")
}
