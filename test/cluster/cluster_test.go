package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestVersionsAreThoseOfGoMod(t *testing.T) {
	for _, module := range []string{"k8s.io/kubernetes", "github.com/coredns/coredns", "go.etcd.io/etcd/server/v3"} {
		if v := version(module); !strings.Contains(goMod, module+" "+v) || strings.Count(v, ".") < 2 {
			t.Errorf("%s is said to be of version %q", module, v)
		}
	}
	want := "-X k8s.io/component-base/version.gitVersion=" + version("k8s.io/kubernetes")
	if flags := linkFlags(); !strings.Contains(flags, want) {
		t.Errorf("the linker is told %s, without %s", flags, want)
	}
}

func TestCoreDNSHasThePluginsOfItsConfiguration(t *testing.T) {
	file, err := writeCoreDNS(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, plugin := range []string{"errors", "health", "ready", "kubernetes", "cache", "loadbalance", "reload"} {
		if !strings.Contains(coreDNS, "        "+plugin) {
			t.Errorf("the Corefile has no %s: this list is old", plugin)
		}
		if !strings.Contains(string(text), `_ "github.com/coredns/coredns/plugin/`+plugin+`"`) {
			t.Errorf("CoreDNS is built without %s:\n%s", plugin, text)
		}
	}
}

func TestMountOptionsChooseTheHierarchy(t *testing.T) {
	for super, want := range map[string]string{
		"rw,cpu":                             "cpu",
		"rw,cpu,cpuacct":                     "cpu,cpuacct",
		"rw,xattr,name=systemd":              "none,name=systemd",
		"rw":                                 "",
		"rw,nsdelegate,memory_recursiveprot": "",
	} {
		if got := mountOptions(super); got != want {
			t.Errorf("a hierarchy with %q is mounted with %q, not %q", super, got, want)
		}
	}
}

// An archive is read back as containerd reads it: by the names and sums that its
// manifest gives.
func TestImageIsWhatItsManifestSays(t *testing.T) {
	folder := t.TempDir()
	made := image{[]string{"example.com/echo:1"}, []string{"/bin/echo"}, []string{"hello"}, files{
		{"bin/echo", 0o755, content("#!/bin/true\n")},
		{"bin/say", os.ModeSymlink, content("echo")},
		{"tmp", os.ModeDir | os.ModeSticky | 0o777, nil},
	}}
	if err := made.write(folder); err != nil {
		t.Fatal(err)
	}
	archive := untar(t, read(t, filepath.Join(folder, "echo.tar")))
	var manifest []struct {
		Config           string
		RepoTags, Layers []string
	}
	decode(t, archive["manifest.json"].bytes, &manifest)
	var configuration struct {
		Config struct{ Entrypoint, Cmd []string }
		Rootfs struct {
			Diffs []string `json:"diff_ids"`
		}
	}
	decode(t, archive[manifest[0].Config].bytes, &configuration)
	layer := archive[manifest[0].Layers[0]].bytes
	sum := sha256.Sum256(layer)
	if want := "sha256:" + hex.EncodeToString(sum[:]); !slices.Equal(configuration.Rootfs.Diffs, []string{want}) {
		t.Errorf("the layer is %s, and the image says %q", want, configuration.Rootfs.Diffs)
	}
	if !slices.Equal(configuration.Config.Entrypoint, made.entrypoint) || !slices.Equal(configuration.Config.Cmd, made.command) || !slices.Equal(manifest[0].RepoTags, made.names) {
		t.Errorf("image of %+v is %+v named %q", made, configuration, manifest[0].RepoTags)
	}
	inside := untar(t, layer)
	if f := inside["bin/echo"]; f.Mode != 0o755 || string(f.bytes) != "#!/bin/true\n" {
		t.Errorf("bin/echo has mode %o and %q", f.Mode, f.bytes)
	}
	if f := inside["bin/say"]; f.Linkname != "echo" {
		t.Errorf("bin/say leads to %q", f.Linkname)
	}
	if f := inside["tmp/"]; f.Mode != 0o1777 || inside["bin/"].Header == nil {
		t.Errorf("tmp has mode %o, bin is there: %v", f.Mode, inside["bin/"].Header != nil)
	}
	if left, _ := filepath.Glob(filepath.Join(folder, "*")); len(left) != 1 {
		t.Errorf("left in the folder: %q", left)
	}
}

type entry struct {
	*tar.Header
	bytes []byte
}

func untar(t *testing.T, content []byte) map[string]entry {
	t.Helper()
	entries := map[string]entry{}
	archive := tar.NewReader(bytes.NewReader(content))
	for {
		header, err := archive.Next()
		if err == io.EOF {
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		entries[header.Name] = entry{header, content}
	}
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func decode(t *testing.T, content []byte, into any) {
	t.Helper()
	if err := json.Unmarshal(content, into); err != nil {
		t.Fatalf("%v: %s", err, content)
	}
}

func TestResultsAreThoseOfTestsThatRan(t *testing.T) {
	ran, err := results([]byte(`<?xml version="1.0" encoding="UTF-8"?>
<testsuites><testsuite name="Kubernetes e2e suite">
<testcase name="[SynchronizedBeforeSuite]" status="passed" time="2.5"></testcase>
<testcase name="[It] [sig-network] Services should serve [Conformance]" status="passed" time="1.5"></testcase>
<testcase name="[It] [sig-network] Services should fail [Conformance]" status="failed" time="3"><failure>no</failure></testcase>
<testcase name="[It] [sig-apps] not asked for" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
<testcase name="[It] [sig-network] Zones" status="skipped" time="0.5"><skipped message="skipped - need at least 3 zones"></skipped></testcase>
</testsuite></testsuites>`))
	want := []result{
		{"[sig-network] Services should serve [Conformance]", "passed", 1.5, ""},
		{"[sig-network] Services should fail [Conformance]", "failed", 3, ""},
		{"[sig-network] Zones", "skipped", 0.5, "skipped - need at least 3 zones"},
	}
	if err != nil || !slices.Equal(ran, want) {
		t.Errorf("read %+v, %v instead of %+v", ran, err, want)
	}
}

// Each node's ranges are among those that the controllers hand out, and nobody
// else's; and none is that of Services.
func TestNodesHaveRangesOfTheirOwn(t *testing.T) {
	manifest := nodeObjects()
	taken := []string{serviceV4, serviceV6}
	for _, n := range allNodes() {
		for of, pods := range map[string]string{podsV4: n.podsV4(), podsV6: n.podsV6()} {
			if !strings.Contains(manifest, pods) {
				t.Errorf("the Node objects do not name %s:\n%s", pods, manifest)
			}
			if !netip.MustParsePrefix(of).Contains(netip.MustParsePrefix(pods).Addr()) {
				t.Errorf("%s has %s, which is not in %s", n.name(), pods, of)
			}
			for _, other := range taken {
				if netip.MustParsePrefix(other).Overlaps(netip.MustParsePrefix(pods)) {
					t.Errorf("%s has %s, and %s is taken", n.name(), pods, other)
				}
			}
			taken = append(taken, pods)
		}
	}
}

func TestManifestOfCoreDNSIsFilledIn(t *testing.T) {
	if filled := fillIn(coreDNS); strings.Contains(filled, "DNS_V") || strings.Contains(filled, "COREDNS_IMAGE") {
		t.Errorf("left in it: a word in capitals\n%s", filled)
	}
}

// What is written is read again, and the next run alters its own column alone.
func TestTableKeepsWhatOthersFound(t *testing.T) {
	first := parseTable("")
	first.add("kube-proxy nftables", []result{{"[sig-network] A", "passed", 1, ""}, {"[sig-network] B", "failed", 1, ""}})
	second := parseTable(first.String())
	second.add("millrace", []result{{"[sig-network] A", "failed", 1, ""}})
	third := parseTable(second.String())
	third.add("millrace", []result{{"[sig-network] A", "passed", 1, ""}, {"[sig-network] C", "skipped", 0, "skipped - needs a | cloud\nand more"}})
	want := `- kube-proxy nftables: 1 passed, 1 failed, 0 cannot be judged here
- millrace: 1 passed, 0 failed, 1 cannot be judged here

| [sig-network] | kube-proxy nftables | millrace |
|---|---|---|
| A | passed | passed |
| B | **failed** |  |
| C |  | not here: needs a / cloud |
`
	if got := third.String(); got != want {
		t.Errorf("the table is\n%s\nnot\n%s", got, want)
	}
}
