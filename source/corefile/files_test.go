package corefile

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coredns/caddy/caddyfile"
	"golang.org/x/tools/txtar"
)

// customized is how k3s, AKS and Gardener run CoreDNS: with the keys of a second ConfigMap,
// which may be missing, in a folder beside the Corefile.
func customized() *Container {
	return &Container{
		Of: "Deployment kube-system/coredns", Corefile: "/etc/coredns/Corefile",
		Mounts: []Mount{
			{Path: "/etc/coredns", ConfigMap: "coredns"},
			{Path: "/etc/coredns/custom", ConfigMap: "coredns-custom", Optional: true},
		},
	}
}

// filesOf are the files of a case of an archive: "case/ConfigMap/key".
func filesOf(archive *txtar.Archive, name string) (text string, files Files) {
	files = Files{Container: customized(), ConfigMaps: map[string]*Keys{"coredns": {Texts: map[string]string{}}, "coredns-custom": nil}}
	for _, f := range archive.Files {
		parts := strings.Split(f.Name, "/")
		if parts[0] != name {
			continue
		}
		if files.ConfigMaps[parts[1]] == nil {
			files.ConfigMaps[parts[1]] = &Keys{Texts: map[string]string{}}
		}
		files.ConfigMaps[parts[1]].Texts[parts[2]] = string(f.Data)
	}
	return files.ConfigMaps["coredns"].Texts[Key], files
}

// What installers import, and what people write into it.
func TestImports(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/imports.txtar")
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, file := range archive.Files {
		if name, is := strings.CutSuffix(file.Name, "/coredns/"+Key); is {
			fmt.Fprintf(&got, "%s: %s", name, said(Read(filesOf(archive, name))))
		}
	}
	compareGolden(t, "testdata/imports.golden", got.String())
}

// Where a file is not a ConfigMap's, or may be another by now, nobody here knows what it has.
func TestFilesThatAreNotKnown(t *testing.T) {
	const text = ".:53 {\nkubernetes cluster.local\nforward . 192.0.2.1\nimport custom/*.override\n}"
	at := func(mounts ...Mount) *Container {
		c := customized()
		c.Mounts = append([]Mount{{Path: "/etc/coredns", ConfigMap: "coredns", Items: []Item{{Key, "Corefile"}}}}, mounts...)
		return c
	}
	custom := Mount{Path: "/etc/coredns/custom", ConfigMap: "coredns-custom"}
	keys := func(texts ...string) map[string]*Keys {
		k := &Keys{Texts: map[string]string{}}
		for i := 0; i < len(texts); i += 2 {
			k.Texts[texts[i]] = texts[i+1]
		}
		return map[string]*Keys{"coredns": {Texts: map[string]string{Key: text}}, "coredns-custom": k}
	}
	sub, items, optional := custom, custom, custom
	sub.Sub = "x"
	items.Items = []Item{{"mine", "a.override"}}
	optional.Items, optional.Optional = items.Items, true
	elsewhere := at(custom)
	elsewhere.Corefile = "/opt/Corefile"
	unsaid := at(custom)
	unsaid.Corefile = ""
	renamed := at(custom)
	renamed.Mounts[0].Items = []Item{{"Other", "Corefile"}}
	for want, files := range map[string]Files{
		"how they are run is not known":                       {},
		"there is no Deployment":                              {Why: "there is no Deployment"},
		"/etc/coredns/custom is a hostPath, not a ConfigMap":  {Container: at(Mount{Path: "/etc/coredns/custom", Else: "a hostPath"})},
		"custom is mounted by subPath":                        {Container: at(sub), ConfigMaps: keys()},
		"the ConfigMap coredns-custom, which is not there":    {Container: at(custom), ConfigMaps: map[string]*Keys{"coredns-custom": nil}},
		"the ConfigMap coredns-custom, which is not read":     {Container: at(custom)},
		"the ConfigMap coredns-custom: forbidden":             {Container: at(custom), ConfigMaps: map[string]*Keys{"coredns-custom": {Unread: "forbidden"}}},
		"coredns-custom at /etc/coredns/custom has no mine":   {Container: at(items), ConfigMaps: keys()},
		"another volume is mounted at /etc/coredns/custom/a.": {Container: at(custom, Mount{Path: "/etc/coredns/custom/a.override", ConfigMap: "coredns", Items: []Item{}}), ConfigMaps: keys()},
		"keys of the ConfigMap are in folders":                {Container: at(Mount{Path: "/etc/coredns/custom", ConfigMap: "coredns-custom", Items: []Item{{"mine", "x/a.override"}}}), ConfigMaps: keys("mine", "")},
		"reads the Corefile /opt/Corefile, which is not that": {Container: elsewhere},
		"reads the Corefile /etc/coredns/Corefile, which":     {Container: renamed},
		"does not say by -conf, with an absolute path":        {Container: unsaid},
		"coredns-custom/mine:2: hosts":                        {Container: at(items), ConfigMaps: keys("mine", "log\nhosts")},
		"":                                                    {Container: at(optional), ConfigMaps: keys("theirs", "hosts")},
	} {
		if d := Read(text, files); want == "" && d.Left != "" || !strings.Contains(d.Left, want) {
			t.Errorf("want %q:\n%s", want, said(d))
		}
	}
}

// The link by which kubelet changes all files of a ConfigMap at once leads to each of them: what
// is named by it is not known, and not taken for a file that is not there.
func TestFilesByTheLinkOfKubelet(t *testing.T) {
	files := Files{Container: customized(), ConfigMaps: map[string]*Keys{
		"coredns":        {Texts: map[string]string{"NodeHosts": "192.0.2.1 node.example"}},
		"coredns-custom": {Texts: map[string]string{"a.override": "rewrite name a.example b.example"}},
	}}
	for _, of := range []string{
		"hosts /etc/coredns/..data/NodeHosts {\nfallthrough\n}",
		"hosts /etc/coredns/..2026_01_02_03_04_05.1234567890/NodeHosts {\nfallthrough\n}",
		"import custom/..data/*.override",
		"import custom/..data/a.override",
	} {
		if d := Read(".:53 {\nkubernetes cluster.local\n"+of+"\nforward . 192.0.2.1\n}", files); !strings.Contains(d.Left, "is by a link of kubelet's") {
			t.Errorf("%s:\n%s", of, said(d))
		}
	}
	if d := Read(".:53 {\nkubernetes cluster.local\nhosts /etc/coredns/..data/../NodeHosts {\nfallthrough\n}\nforward . 192.0.2.1\n}", files); !d.HasHost("node.example") {
		t.Errorf("beside the link:\n%s", said(d))
	}
}

// /etc/hosts is kubelet's, but for what the pod says otherwise.
func TestHostsOfThePod(t *testing.T) {
	for want, change := range map[string]func(*Container){
		"hosts [* a.example alias.example] [192.0.2.1 192.0.2.8]": func(c *Container) { c.Aliases = "192.0.2.8 alias.example\n" },
		"of the node (hostNetwork)":                               func(c *Container) { c.Hosts = "/etc/hosts is that of the node (hostNetwork)" },
		"is an emptyDir, not a ConfigMap":                         func(c *Container) { c.Mounts = append(c.Mounts, Mount{Path: "/etc/hosts", Else: "an emptyDir"}) },
	} {
		files := Files{Container: customized()}
		change(files.Container)
		if d := said(Read(".:53 {\nkubernetes cluster.local\nhosts {\n192.0.2.1 a.example\nfallthrough\n}\nforward . 192.0.2.1\n}", files)); !strings.Contains(d, want) {
			t.Errorf("want %q:\n%s", want, d)
		}
	}
}

// A pattern that CoreDNS refuses, or a file that imports itself, ends soon.
func TestImportsThatEnd(t *testing.T) {
	for imported, want := range map[string]string{
		"import custom/*":          "it stands for folders, too",
		"import custom/*/*":        "one wildcard is allowed",
		"import custom/missing":    "there is no such file in ConfigMap coredns-custom",
		"import /usr/share/x":      "/usr/share is of the image",
		"import /etc/*/x":          "wildcards of folders are not followed",
		"import custom/itself":     "there are more than 200 imports",
		"import custom/long":       "there are more than 10000 words",
		"import custom/zone":       "{$ZONE} is from the environment",
		"import custom/":           "another volume is mounted at /etc/coredns/custom",
		"import custom/long again": "import takes one name",
		"import":                   "import of nothing",
	} {
		files := Files{Container: customized(), ConfigMaps: map[string]*Keys{"coredns-custom": {Texts: map[string]string{
			"itself": "import itself", "long": strings.Repeat("log x\n", 4000) + "import long", "zone": "log {$ZONE}",
		}}}}
		if d := Read(".:53 {\nkubernetes cluster.local\n"+imported+"\nforward . 192.0.2.1\n}", files); !strings.Contains(d.Left, want) {
			t.Errorf("%s: want %q:\n%s", imported, want, said(d))
		}
	}
}

// FuzzImports looks for files that are put together otherwise than by CoreDNS' own parser,
// which reads them from a folder. Of what it refuses nothing is used; more may be refused.
func FuzzImports(f *testing.F) {
	archive, err := txtar.ParseFile("testdata/imports.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range archive.Files {
		if name, is := strings.CutSuffix(file.Name, "/coredns/"+Key); is {
			text, files := filesOf(archive, name)
			one, other := "", ""
			if custom := files.ConfigMaps["coredns-custom"]; custom != nil {
				one, other = custom.Texts["a.override"], custom.Texts["b.server"]
			}
			f.Add(text, one, other)
		}
	}
	f.Add("import custom/a.override\n. {\nimport custom/*.override\nlog {\nimport custom/b.server\n}\n}", "(a) {\nlog\n}", "import a\nimport a.override")
	f.Add("import custom/b.server\nimport custom/b.server", "x {\n}", "import a.override\n")
	f.Fuzz(func(t *testing.T, text, one, other string) {
		base := t.TempDir()
		custom := filepath.Join(base, "custom")
		if err := os.MkdirAll(filepath.Join(custom, "..data"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, data := range map[string]string{"a.override": one, "b.server": other} {
			if err := os.WriteFile(filepath.Join(custom, name), []byte(data), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		conf := filepath.Join(base, Key)
		files := &Files{
			Container:  &Container{Corefile: conf, Mounts: []Mount{{Path: custom, ConfigMap: "coredns-custom"}}},
			ConfigMaps: map[string]*Keys{"coredns-custom": {Texts: map[string]string{"a.override": one, "b.server": other}}},
		}
		ours, err := parse(text, files)
		if err != nil || strings.Contains(text+one+other, "..") || ours.aliens() {
			return // more may be refused, or not be known; and nothing beside the folder is read
		}
		theirs, err := caddyfile.Parse(conf, strings.NewReader(text), nil)
		if err != nil {
			t.Fatalf("%q, %q, %q: CoreDNS refuses it: %v", text, one, other, err)
		}
		if got, want := groupedAll(ours.blocks), groupedAllByThem(theirs); !slices.Equal(got, want) {
			t.Errorf("%q, %q, %q are\n%q, and CoreDNS reads\n%q", text, one, other, got, want)
		}
	})
}

// aliens says whether something of it is not known.
func (p *parser) aliens() bool {
	return p.alien != "" || slices.ContainsFunc(p.blocks, func(b block) bool { return b.alien != "" })
}

func groupedAll(blocks []block) (all []string) {
	for _, b := range blocks {
		all = append(all, grouped(b))
	}
	return all
}

func groupedAllByThem(blocks []caddyfile.ServerBlock) (all []string) {
	for _, b := range blocks {
		all = append(all, groupedByThem(b))
	}
	return all
}
