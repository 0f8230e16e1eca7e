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

// crds are kinds that are no part of Kubernetes: what checks read of them, not how they
// are validated.
var crds = []struct{ group, version, plural, kind, scope string }{
	{"gateway.networking.k8s.io", "v1", "gatewayclasses", "GatewayClass", "Cluster"},
	{"gateway.networking.k8s.io", "v1", "gateways", "Gateway", "Namespaced"},
	{"gateway.networking.k8s.io", "v1", "httproutes", "HTTPRoute", "Namespaced"},
	{"gateway.networking.k8s.io", "v1beta1", "referencegrants", "ReferenceGrant", "Namespaced"},
}

const crd = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: %[3]s.%[1]s, annotations: {api-approved.kubernetes.io: "https://github.com/kubernetes-sigs/gateway-api"}}
spec:
  group: %[1]s
  scope: %[5]s
  names: {plural: %[3]s, kind: %[4]s}
  versions: [{name: %[2]s, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]
---
`

// foundInObjects are the checks that find what is in testdata/broken.yaml.
const foundInObjects = "PX-12 PX-13 PX-14 PX-18 PX-19 PX-20 PX-21 PX-22 PX-23 PX-24 PX-25 CT-14 " +
	"DN-02 DN-04 DN-05 DN-12 DN-13 DN-14 DN-15 DN-16 DN-17 DN-18 DN-19 DN-20 DN-21 MT-09 " +
	"CN-02 CN-03 CN-04 CN-05 CN-08 CN-11 CN-12 CN-15 CN-16 CN-17 CN-18 CN-19 CN-20 CN-21 CN-22 CN-23 CN-24 " +
	"IN-01 IN-02 IN-03 IN-04 IN-05 IN-06 IN-07 GW-01 GW-02 GW-03 GW-04 GW-05"

// apiBed is an API server without controllers, in a network namespace of the test's own:
// objects stay as they are written.
type apiBed struct {
	t                            *testing.T
	bin, folder, space, millrace string
	// services are the ranges of Services' addresses.
	services string
	// api is the server's process.
	api *exec.Cmd
}

// In objects of a real API server in which all is well doctor finds nothing; it finds
// what is broken in others, and says what it may not list.
func TestDoctorOfRealObjects(t *testing.T) {
	b := newAPIBed(t)
	healthy := string(read(t, filepath.Join(root, "doctor", "testdata", "cluster.yaml")))
	b.apply(asServed(healthy))
	b.findsOnly("")
	broken := string(read(t, filepath.Join("testdata", "broken.yaml")))
	var crowd strings.Builder
	crowd.WriteString("\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {name: web-2, namespace: shop, labels: {kubernetes.io/service-name: web}}\nendpoints:\n")
	for i := range 251 {
		fmt.Fprintf(&crowd, "- {addresses: [10.244.%d.%d]}\n", 128+i/200, 1+i%200)
	}
	b.apply(broken + crowd.String())
	b.findsOnly(foundInObjects)
	b.must(b.inside("ip", "route", "add", "10.244.0.0/24", "via", "192.0.2.1"))
	for _, c := range b.doctor("admin", "CN-10", "MT-07") { // the node is compared with its cluster
		if c.Status != "fail" && c.Status != "warn" {
			t.Errorf("%s is %s: %+v", c.ID, c.Status, c.Evidence)
		}
		t.Logf("%s %s: %+v", c.ID, c.Status, c.Evidence[0])
	}
	for _, c := range b.doctor("nobody", "cluster") {
		text := fmt.Sprint(c.Evidence)
		if c.Status != "skip" || !strings.Contains(text, "forbidden") && !strings.Contains(text, "cannot list") {
			t.Errorf("%s of somebody who may list nothing is %s: %.300s", c.ID, c.Status, text)
		}
	}
}

func newAPIBed(t *testing.T) *apiBed { return newAPIBedFor(t, serviceV4) }

// newAPIBedFor is one with other ranges of Services' addresses, and with more tools.
func newAPIBedFor(t *testing.T, services string, more ...string) *apiBed {
	if os.Getuid() != 0 {
		t.Skip("needs root: it makes a network namespace")
	}
	t.Chdir(root)
	bin := built(t, append([]string{"etcd", "kube-apiserver", "kubectl"}, more...))
	b := &apiBed{t: t, bin: bin, folder: t.TempDir(), services: services, space: fmt.Sprintf("millrace-doctor-%d", os.Getpid())}
	b.millrace = filepath.Join(b.folder, "millrace")
	if text, err := exec.Command("go", "build", "-o", b.millrace, "./cmd/millrace").CombinedOutput(); err != nil {
		t.Fatalf("build millrace: %v\n%s", err, text)
	}
	t.Chdir(moduleFolder)
	b.must(exec.Command("ip", "netns", "add", b.space))
	t.Cleanup(func() { exec.Command("ip", "netns", "delete", b.space).Run() })
	b.must(b.inside("ip", "link", "set", "lo", "up"))
	b.must(b.inside("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1"))
	b.must(b.inside("sh", "-c", "ip addr add 192.0.2.50/24 dev up0; ip link set up1 up; ip link set up0 up; ip route add default dev up0"))
	b.start()
	return b
}

// start starts etcd and the API server, which end with the test.
func (b *apiBed) start() {
	authority, err := newAuthority()
	if err != nil {
		b.t.Fatal(err)
	}
	certificate, key, err := authority.issue()
	err = errors.Join(err, os.WriteFile(b.folder+"/server.crt", []byte(certificate), 0o600), os.WriteFile(b.folder+"/server.key", []byte(key), 0o600),
		os.WriteFile(b.folder+"/users.csv", []byte("admin-token,admin,admin,system:masters\nnobody-token,nobody,nobody\n"), 0o600))
	for _, user := range []string{"admin", "nobody"} {
		config := strings.ReplaceAll(kubeconfigOf(authority.text, user+"-token"), controlV4, "127.0.0.1")
		err = errors.Join(err, os.WriteFile(b.folder+"/"+user, []byte(config), 0o600))
	}
	if err != nil {
		b.t.Fatal(err)
	}
	for _, words := range [][]string{
		{"etcd", "--data-dir", b.folder + "/etcd", "--unsafe-no-fsync", "--log-level", "error"},
		{"kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443", "--bind-address=127.0.0.1", "--advertise-address=192.0.2.50",
			"--tls-cert-file=" + b.folder + "/server.crt", "--tls-private-key-file=" + b.folder + "/server.key", "--token-auth-file=" + b.folder + "/users.csv",
			"--cert-dir=" + b.folder, "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount", "--service-cluster-ip-range=" + b.services,
			"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + b.folder + "/server.key",
			"--service-account-signing-key-file=" + b.folder + "/server.key", "--endpoint-reconciler-type=none"},
	} {
		log, err := os.Create(filepath.Join(b.folder, words[0]+".log"))
		if err != nil {
			b.t.Fatal(err)
		}
		c := b.inside(append([]string{filepath.Join(b.bin, words[0])}, words[1:]...)...)
		c.Stdout, c.Stderr = log, log
		if err := c.Start(); err != nil {
			b.t.Fatal(err)
		}
		b.t.Cleanup(func() { c.Process.Kill(); c.Wait(); log.Close() })
		b.api = c
	}
	err = until(b.t.Context(), "kube-apiserver", 5*time.Minute, func() error {
		return b.kubectl("", "get", "--raw", "/readyz")
	})
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(b.folder, "kube-apiserver.log"))
		b.t.Fatalf("%v\n%s", err, lastLines(string(log), 5))
	}
	text := ""
	for _, c := range crds {
		text += fmt.Sprintf(crd, c.group, c.version, c.plural, c.kind, c.scope)
	}
	for _, name := range []string{"shop", "edge", "kube-flannel", "ingress-nginx"} {
		text += fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s}\n---\n", name)
	}
	b.want(b.kubectl(text, "apply", "--server-side", "-f", "-"))
	b.want(b.kubectl("", "wait", "--for=condition=Established", "crd", "--all", "--timeout=2m"))
}

func (b *apiBed) inside(words ...string) *exec.Cmd {
	return exec.Command("ip", append([]string{"netns", "exec", b.space}, words...)...)
}

func (b *apiBed) must(c *exec.Cmd) {
	b.t.Helper()
	if text, err := c.CombinedOutput(); err != nil {
		b.t.Fatalf("%s: %v: %s", strings.Join(c.Args, " "), err, text)
	}
}

func (b *apiBed) want(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *apiBed) kubectl(input string, words ...string) error {
	c := b.inside(append([]string{filepath.Join(b.bin, "kubectl"), "--kubeconfig", b.folder + "/admin"}, words...)...)
	c.Stdin = strings.NewReader(input)
	text, err := c.CombinedOutput()
	if err != nil {
		return fmt.Errorf("kubectl %s: %w: %.2000s", strings.Join(words, " "), err, text)
	}
	return nil
}

// asServed makes the manifests that checks are tested with such as an API server takes.
func asServed(manifests string) string {
	return strings.NewReplacer(
		", uid: u", "",
		"readinessProbe: {}", "image: x, readinessProbe: {tcpSocket: {port: 1}}",
		"spec: {template: {spec: {", "spec: {selector: {matchLabels: {a: b}}, template: {metadata: {labels: {a: b}}, spec: {",
		"status: {desiredNumberScheduled: 2, numberReady: 2}", "status: {desiredNumberScheduled: 2, numberReady: 2, currentNumberScheduled: 2, numberMisscheduled: 0}",
		"podIPs: [{ip: 10.244.0.2}]", "podIPs: [{ip: 10.244.0.2}], podIP: 10.244.0.2", "podIPs: [{ip: 10.244.1.2}]", "podIPs: [{ip: 10.244.1.2}], podIP: 10.244.1.2",
		"podIPs: [{ip: 10.244.0.3}]", "podIPs: [{ip: 10.244.0.3}], podIP: 10.244.0.3", "podIPs: [{ip: 10.244.1.3}]", "podIPs: [{ip: 10.244.1.3}], podIP: 10.244.1.3",
		"\nendpoints:", "\naddressType: IPv4\nendpoints:",
		"kind: IngressClass\nmetadata: {name: edge, uid: u}", "kind: IngressClass\nmetadata: {name: edge}\nspec: {controller: example.org/edge}",
	).Replace(manifests)
}

// apply writes the objects, and then the status of those whose status is written apart.
func (b *apiBed) apply(manifests string) {
	b.t.Helper()
	var specs, status []string
	for _, one := range strings.Split(manifests, "\n---\n") {
		if strings.Contains(one, "kind: ServiceCIDR") {
			continue // the API server makes its own
		}
		body, said, has := strings.Cut(one, "\nstatus:")
		apart := !strings.Contains(one, "gateway.networking.k8s.io")
		switch {
		case has && apart:
			head, _, _ := strings.Cut(body, "\nspec:")
			status = append(status, head+"\nstatus:"+said)
			one = body
		}
		if strings.Contains(one, "\nspec:") || !has || !apart {
			specs = append(specs, one)
		}
	}
	b.want(b.kubectl(strings.Join(specs, "\n---\n"), "apply", "--server-side", "--force-conflicts", "-f", "-"))
	b.want(b.kubectl(strings.Join(status, "\n---\n"), "apply", "--server-side", "--force-conflicts", "--subresource=status", "-f", "-"))
}

// checked is what doctor says of one check.
type checked struct {
	ID, Status string
	Evidence   []struct{ Scope, Read, Value string }
}

// doctor runs some checks as a user.
func (b *apiBed) doctor(user string, only ...string) []checked {
	b.t.Helper()
	c := b.inside(b.millrace, "doctor", "--source", "kube:"+b.folder+"/"+user, "--only", strings.Join(only, ","), "--for", "0s", "-o", "json")
	text, err := c.Output()
	var made struct{ Checks []checked }
	if broken := json.Unmarshal(text, &made); broken != nil {
		b.t.Fatalf("%v, %v: %s", err, broken, text)
	}
	return made.Checks
}

// findsOnly checks which of the checks find something, by their IDs.
func (b *apiBed) findsOnly(want string) {
	b.t.Helper()
	wanted := strings.Fields(want)
	for _, c := range b.doctor("admin", "cluster") {
		found := c.Status == "warn" || c.Status == "fail"
		switch {
		case found != slices.Contains(wanted, c.ID):
			b.t.Errorf("%s is %s: %+v", c.ID, c.Status, c.Evidence)
		case c.Status == "skip":
			b.t.Errorf("%s is skipped: %+v", c.ID, c.Evidence)
		case found:
			b.t.Logf("%s %s: %+v", c.ID, c.Status, c.Evidence[0])
		}
	}
}
