#!/usr/bin/env python3
"""Write the German-English corpus of the benchmark ``demo``: no download, the same bytes everywhere.

A small grammar builds each sentence twice from one structure, once in German and once in English, so
every German sentence has exactly one translation. German shows case, gender and number agreement,
verb-second and verb-final order, separable verbs, the perfect, modals, compounds and number words;
English shows articles, do-support, contractions and the possessive 's. A few conventions of the
grammar, each of which a model can read off the German sentence:

* present -> simple present; with *gerade/jetzt/heute* -> progressive; with *morgen* and the like -> *will*;
* perfect -> simple past; with *schon / noch nicht / noch nie* -> present perfect;
* a fronted German adverbial is fronted in English, one in the middle field stands last;
* *ihr* is *her* or *their* as its subject says; *sein/ihr* always refer to the subject;
* a relative pronoun is the subject after a person or animal, the object after a thing;
* *sie* with a plural verb is *they* (the grammar has no polite *Sie*), *Kein Kind* as a subject *no child*;
* a negated auxiliary is contracted, and so are *be/have/will/would* after a pronoun; spelling is American.

Held out (see ``held_out``): a fixed share of the compounds, of the number words and of the pairs of an
adjective and the noun it describes occurs only in ``test``; every test sentence has at least one of
them, no training or validation sentence has any. Their parts do occur in a training set of the default size.

Reproducibility: the only source of chance is ``random.Random(<int>).random()``, whose sequence Python
documents as stable across versions; no set or ``hash`` order reaches the output.

Example: ``python scripts/lib/demo_corpus.py data/demo-raw --train 6000 --valid 300 --test 300 --seed 1``
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace

TRAIN, VALID, TEST, SEED = 6000, 300, 300, 1
MAX_TOTAL = 100_000  # sentences over all splits; the grammar is known to supply this many
MAX_MISSES = 20_000  # fruitless draws in a row after which a split is given up
SPLITS = ("train", "valid", "test")

# --------------------------------------------------------------------------------------------------
# Lexicon. Nouns: lemma, gender, genitive, plural ("-": none), English[:plural], classes.
# Classes: P person, A animal, F food one counts, M food as a mass, D drink, R to read, T small thing,
# C clothing, V vehicle, U furniture, B building or place, X abstract; the lower-case letters are the
# objects of a few verbs (w write, k cook, e bake, b build, m repair, o open, q close, r tidy, l learn,
# s solve, t tell, h part of a house, f look forward to, i a toy to play with, g what gets counted in a place).
# --------------------------------------------------------------------------------------------------
NOUNS = """
Mann m Mannes Männer man:men P
Frau f Frau Frauen woman:women P
Kind n Kindes Kinder child:children Pg
Junge m Jungen Jungen boy P
Mädchen n Mädchens Mädchen girl P
Lehrer m Lehrers Lehrer teacher P
Lehrerin f Lehrerin Lehrerinnen teacher P
Arzt m Arztes Ärzte doctor P
Ärztin f Ärztin Ärztinnen doctor P
Schüler m Schülers Schüler pupil P
Student m Studenten Studenten student P
Studentin f Studentin Studentinnen student P
Freund m Freundes Freunde friend P
Nachbar m Nachbarn Nachbarn neighbor P
Nachbarin f Nachbarin Nachbarinnen neighbor P
Bruder m Bruders Brüder brother P
Schwester f Schwester Schwestern sister P
Vater m Vaters Väter father P
Mutter f Mutter Mütter mother P
Onkel m Onkels Onkel uncle P
Tante f Tante Tanten aunt P
Großvater m Großvaters Großväter grandfather P
Großmutter f Großmutter Großmütter grandmother P
Sohn m Sohnes Söhne son P
Tochter f Tochter Töchter daughter P
Koch m Kochs Köche cook P
Bäcker m Bäckers Bäcker baker P
Bauer m Bauern Bauern farmer P
Gärtner m Gärtners Gärtner gardener P
Polizist m Polizisten Polizisten police_officer P
Musiker m Musikers Musiker musician P
Maler m Malers Maler painter P
Künstlerin f Künstlerin Künstlerinnen artist P
Sängerin f Sängerin Sängerinnen singer P
Richter m Richters Richter judge P
Kellner m Kellners Kellner waiter P
Ingenieur m Ingenieurs Ingenieure engineer P
Kapitän m Kapitäns Kapitäne captain P
Gast m Gastes Gäste guest Pg
König m Königs Könige king P
Königin f Königin Königinnen queen P
Pilot m Piloten Piloten pilot P
Hund m Hundes Hunde dog Ag
Katze f Katze Katzen cat Ag
Pferd n Pferdes Pferde horse Ag
Vogel m Vogels Vögel bird Ag
Kuh f Kuh Kühe cow A
Maus f Maus Mäuse mouse:mice Ag
Elefant m Elefanten Elefanten elephant A
Bär m Bären Bären bear A
Löwe m Löwen Löwen lion A
Affe m Affen Affen monkey A
Hase m Hasen Hasen hare A
Schaf n Schafes Schafe sheep:sheep A
Ente f Ente Enten duck Ag
Schwein n Schweins Schweine pig A
Wolf m Wolfes Wölfe wolf:wolves A
Fuchs m Fuchses Füchse fox A
Gans f Gans Gänse goose:geese A
Apfel m Apfels Äpfel apple F
Birne f Birne Birnen pear F
Kuchen m Kuchens Kuchen cake Fe
Ei n Eis Eier egg Fk
Kartoffel f Kartoffel Kartoffeln potato:potatoes Fk
Tomate f Tomate Tomaten tomato:tomatoes F
Suppe f Suppe Suppen soup Fk
Salat m Salats Salate salad F
Orange f Orange Orangen orange F
Kirsche f Kirsche Kirschen cherry F
Keks m Kekses Kekse cookie Fe
Pizza f Pizza Pizzas pizza Fe
Pudding m Puddings Puddings pudding Fk
Wurst f Wurst Würste sausage F
Brot n Brotes - bread Me
Käse m Käses - cheese M
Reis m Reises - rice Mk
Fleisch n Fleisches - meat Mk
Schokolade f Schokolade - chocolate M
Honig m Honigs - honey M
Eis n Eises - ice_cream M
Wasser n Wassers - water D
Milch f Milch - milk D
Kaffee m Kaffees - coffee D
Tee m Tees - tea D
Saft m Saftes - juice D
Wein m Weines - wine D
Buch n Buches Bücher book Rwg
Zeitung f Zeitung Zeitungen newspaper R
Brief m Briefes Briefe letter Rwo
Roman m Romans Romane novel Rw
Gedicht n Gedichtes Gedichte poem Rwl
Zeitschrift f Zeitschrift Zeitschriften magazine R
Bericht m Berichtes Berichte report Rw
Geschichte f Geschichte Geschichten story Rwt
Nachricht f Nachricht Nachrichten message Rw
Postkarte f Postkarte Postkarten postcard Rw
Artikel m Artikels Artikel article Rw
Schlüssel m Schlüssels Schlüssel key T
Lampe f Lampe Lampen lamp Tmg
Uhr f Uhr Uhren clock Tm
Ball m Balles Bälle ball Ti
Tasche f Tasche Taschen bag To
Messer n Messers Messer knife:knives T
Löffel m Löffels Löffel spoon T
Teller m Tellers Teller plate T
Tasse f Tasse Tassen cup T
Glas n Glases Gläser glass T
Flasche f Flasche Flaschen bottle To
Bild n Bildes Bilder picture Tg
Spiegel m Spiegels Spiegel mirror T
Ring m Ringes Ringe ring T
Regenschirm m Regenschirms Regenschirme umbrella T
Koffer m Koffers Koffer suitcase To
Stift m Stiftes Stifte pen T
Kerze f Kerze Kerzen candle T
Kamera f Kamera Kameras camera Tm
Computer m Computers Computer computer Tmg
Telefon n Telefons Telefone telephone Tm
Geschenk n Geschenks Geschenke gift To
Gitarre f Gitarre Gitarren guitar Tm
Geige f Geige Geigen violin Tm
Puppe f Puppe Puppen doll Ti
Werkzeug n Werkzeugs Werkzeuge tool T
Decke f Decke Decken blanket T
Kissen n Kissens Kissen pillow T
Korb m Korbes Körbe basket T
Schachtel f Schachtel Schachteln box Toq
Mantel m Mantels Mäntel coat C
Kleid n Kleides Kleider dress C
Hemd n Hemdes Hemden shirt C
Rock m Rockes Röcke skirt C
Hut m Hutes Hüte hat C
Jacke f Jacke Jacken jacket C
Schuh m Schuhs Schuhe shoe C
Schal m Schals Schals scarf:scarves C
Mütze f Mütze Mützen cap C
Pullover m Pullovers Pullover sweater C
Handschuh m Handschuhs Handschuhe glove C
Auto n Autos Autos car Vmg
Bus m Busses Busse bus Vm
Zug m Zuges Züge train V
Fahrrad n Fahrrads Fahrräder bicycle Vmg
Schiff n Schiffes Schiffe ship Vb
Boot n Bootes Boote boat Vmb
Flugzeug n Flugzeugs Flugzeuge airplane Vmb
Lastwagen m Lastwagens Lastwagen truck Vm
Straßenbahn f Straßenbahn Straßenbahnen streetcar V
Taxi n Taxis Taxis taxi V
Tisch m Tisches Tische table Umg
Stuhl m Stuhls Stühle chair Umg
Bett n Bettes Betten bed Ug
Schrank m Schranks Schränke closet Uoqrg
Sofa n Sofas Sofas sofa Um
Regal n Regals Regale shelf:shelves Ub
Tür f Tür Türen door hoqmg
Fenster n Fensters Fenster window hoqmg
Haus n Hauses Häuser house Bb
Schule f Schule Schulen school Bb
Garten m Gartens Gärten garden B
Park m Parks Parks park B
Küche f Küche Küchen kitchen Br
Kirche f Kirche Kirchen church Bb
Museum n Museums Museen museum Bb
Hotel n Hotels Hotels hotel Bb
Bahnhof m Bahnhofs Bahnhöfe station Bb
Krankenhaus n Krankenhauses Krankenhäuser hospital Bb
Bibliothek f Bibliothek Bibliotheken library Bb
Theater n Theaters Theater theater Bb
Kino n Kinos Kinos movie_theater B
Restaurant n Restaurants Restaurants restaurant B
Supermarkt m Supermarkts Supermärkte supermarket B
Bäckerei f Bäckerei Bäckereien bakery B
Büro n Büros Büros office Br
Stadt f Stadt Städte city B
Dorf n Dorfes Dörfer village B
Wald m Waldes Wälder forest B
Strand m Strandes Strände beach B
Fluss m Flusses Flüsse river B
See m Sees Seen lake B
Berg m Berges Berge mountain B
Schloss n Schlosses Schlösser castle Bb
Fabrik f Fabrik Fabriken factory Bb
Universität f Universität Universitäten university B
Markt m Marktes Märkte market B
Bauernhof m Bauernhofs Bauernhöfe farm B
Insel f Insel Inseln island B
Brücke f Brücke Brücken bridge Bb
Wohnung f Wohnung Wohnungen apartment Br
Zimmer n Zimmers Zimmer room Br
Frage f Frage Fragen question X
Problem n Problems Probleme problem Xs
Idee f Idee Ideen idea X
Lied n Liedes Lieder song Xl
Film m Filmes Filme movie Xf
Plan m Planes Pläne plan X
Fehler m Fehlers Fehler mistake X
Antwort f Antwort Antworten answer X
Spiel n Spieles Spiele game Xf
Reise f Reise Reisen trip f
Feier f Feier Feiern party f
Sprache f Sprache Sprachen language Xl
Prüfung f Prüfung Prüfungen exam X
Aufgabe f Aufgabe Aufgaben task Xs
Geheimnis n Geheimnisses Geheimnisse secret Xt
Witz m Witzes Witze joke Xt
"""

# Adjectives: lemma, attributive stem, comparative, English[:comparative] ("-": not compared), classes.
ADJECTIVES = """
groß groß größer big:bigger ATCVUB
klein klein kleiner small:smaller ATCVUB
alt alt älter old:older PARTCVUB
neu neu neuer new:newer RTCVUBX
jung jung jünger young:younger PA
schön schön schöner beautiful:more_beautiful ARTCVUBX
hässlich hässlich hässlicher ugly:uglier ATCVU
gut gut besser good:better FMDRX
schlecht schlecht schlechter bad:worse FMDRX
teuer teur teurer expensive:more_expensive FMDRTCVU
billig billig billiger cheap:cheaper FMDRTCVU
heiß heiß heißer hot:hotter D
kalt kalt kälter cold:colder D
süß süß süßer sweet:sweeter FM
frisch frisch frischer fresh:fresher FMD
lecker lecker leckerer delicious:more_delicious FM
schnell schnell schneller fast:faster AV
langsam langsam langsamer slow:slower AV
schwer schwer schwerer heavy:heavier TUA
lang lang länger long:longer RX
kurz kurz kürzer short:shorter RX
dünn dünn dünner thin:thinner AR
dunkel dunkl - dark CB
rot rot - red TCVU
blau blau - blue TCVU
grün grün - green TCVU
gelb gelb - yellow TCVU
schwarz schwarz - black ATCVU
weiß weiß - white ATCVU
braun braun - brown ATCU
grau grau - gray ATCVU
rosa rosa - pink TCV
lila lila - purple TCU
freundlich freundlich freundlicher friendly:friendlier PA
fleißig fleißig fleißiger diligent:more_diligent P
faul faul fauler lazy:lazier PA
klug klug klüger clever:cleverer PA
müde müd müder tired:more_tired PA
traurig traurig trauriger sad:sadder PARX
glücklich glücklich glücklicher happy:happier PA
krank krank kränker sick:sicker PA
hungrig hungrig hungriger hungry:hungrier PA
stark stark stärker strong:stronger PA
schwach schwach schwächer weak:weaker PA
berühmt berühmt berühmter famous:more_famous PRB
reich reich reicher rich:richer P
nett nett netter nice:nicer P
lustig lustig lustiger funny:funnier PRX
laut laut lauter loud:louder V
wichtig wichtig wichtiger important:more_important RX
interessant interessant interessanter interesting:more_interesting RXB
langweilig langweilig langweiliger boring:more_boring RXB
schwierig schwierig schwieriger difficult:more_difficult X
einfach einfach einfacher simple:simpler X
leer leer - empty B
sauber sauber sauberer clean:cleaner TCVB
schmutzig schmutzig schmutziger dirty:dirtier ATCVU
kaputt kaputt - broken TVU
gefährlich gefährlich gefährlicher dangerous:more_dangerous A
modern modern moderner modern:more_modern UVB
bequem bequem bequemer comfortable:more_comfortable CUV
mutig mutig mutiger brave:braver PA
ehrlich ehrlich ehrlicher honest:more_honest P
nützlich nützlich nützlicher useful:more_useful RT
ungewöhnlich ungewöhnlich ungewöhnlicher unusual:more_unusual ARTCVX
seltsam seltsam seltsamer strange:stranger ARTCVUBX
höflich höflich höflicher polite:more_polite P
geduldig geduldig geduldiger patient:more_patient P
neugierig neugierig neugieriger curious:more_curious PA
"""

# Verbs: infinitive ("auf_machen": separable; "sich_": reflexive), du,er forms ("-": regular), participle,
# h(aben)/s(ein) | English (+particle), past, participle ("-": regular) | frame, subject and object classes,
# "*" stative. Frames: I intransitive, A accusative, D dative, G dative + accusative, O the same with "to"
# in English, L direction, C that-clause, Z infinitive with zu, "<preposition>+<case>" prepositional object.
VERBS = """
schlafen schläfst,schläft geschlafen h | sleep slept slept | I PA
lachen - gelacht h | laugh - - | I P
weinen - geweint h | cry - - | I P
arbeiten - gearbeitet h | work - - | I P
tanzen - getanzt h | dance - - | I P
singen - gesungen h | sing sang sung | I P
schwimmen - geschwommen s | swim swam swum | I PA
spielen - gespielt h | play - - | I PA
lächeln - gelächelt h | smile - - | I P
auf_stehen - aufgestanden s | get_up got gotten | I P
ein_schlafen schläfst,schläft eingeschlafen s | fall_asleep fell fallen | I PA
ein_kaufen - eingekauft h | go_shopping went gone | I P
fern_sehen siehst,sieht ferngesehen h | watch_TV - - | I P
auf_wachen - aufgewacht s | wake_up woke woken | I PA
zurück_kommen - zurückgekommen s | come_back came come | I PA
weg_laufen läufst,läuft weggelaufen s | run_away ran run | I PA
aus_gehen - ausgegangen s | go_out went gone | I P
sich_beeilen - beeilt h | hurry - - | I P
sich_aus_ruhen - ausgeruht h | rest - - | I PA
sich_verlaufen verläufst,verläuft verlaufen h | get_lost got gotten | I PA
sich_langweilen - gelangweilt h | be_bored was been | I P *
sich_verstecken - versteckt h | hide hid hidden | I PA
essen isst,isst gegessen h | eat ate eaten | A P FM
trinken - getrunken h | drink drank drunk | A P D
kochen - gekocht h | cook - - | A P k
backen bäckst,bäckt gebacken h | bake - - | A P e
lesen liest,liest gelesen h | read read read | A P R
schreiben - geschrieben h | write wrote written | A P w
kaufen - gekauft h | buy bought bought | A P FRTCVUM
verkaufen - verkauft h | sell sold sold | A P RTCVU
sehen siehst,sieht gesehen h | see saw seen | A P PAVB *
suchen - gesucht h | look_for - - | A P PATCR
finden - gefunden h | find found found | A P ATCR
kennen - gekannt h | know knew known | A P PBX *
lieben - geliebt h | love - - | A P PA *
brauchen - gebraucht h | need - - | A P TCVU *
haben hast,hat gehabt h | have had had | A P ATCVX *
bekommen - bekommen h | get got gotten | A P TRC
verlieren - verloren h | lose lost lost | A P TC
vergessen vergisst,vergisst vergessen h | forget forgot forgotten | A P TX
tragen trägst,trägt getragen h | wear wore worn | A P C
waschen wäschst,wäscht gewaschen h | wash - - | A P CA
reparieren - repariert h | repair - - | A P m
bauen - gebaut h | build built built | A P b
malen - gemalt h | paint - - | A P AB
zeichnen - gezeichnet h | draw drew drawn | A P PAB
besuchen - besucht h | visit - - | A P PB
fragen - gefragt h | ask - - | A P P
treffen triffst,trifft getroffen h | meet met met | A P P
begrüßen - begrüßt h | greet - - | A P P
ein_laden lädst,lädt eingeladen h | invite - - | A P P
an_rufen - angerufen h | call - - | A P P
ab_holen - abgeholt h | pick_+up - - | A P P
auf_machen - aufgemacht h | open - - | A P o
zu_machen - zugemacht h | close - - | A P q
auf_räumen - aufgeräumt h | tidy_+up - - | A P r
mit_bringen - mitgebracht h | bring_+along brought brought | A P FTR
an_ziehen - angezogen h | put_+on put put | A P C
aus_ziehen - ausgezogen h | take_+off took taken | A P C
an_probieren - anprobiert h | try_+on - - | A P C
weg_werfen wirfst,wirft weggeworfen h | throw_+away threw thrown | A P TR
verstehen - verstanden h | understand understood understood | A P PX *
lösen - gelöst h | solve - - | A P s
lernen - gelernt h | learn - - | A P l
füttern - gefüttert h | feed fed fed | A P A
jagen - gejagt h | chase - - | A A A
fotografieren - fotografiert h | photograph - - | A P PAB
benutzen - benutzt h | use - - | A P Tm
stehlen stiehlst,stiehlt gestohlen h | steal stole stolen | A P TRV
bestellen - bestellt h | order - - | A P FMD
probieren - probiert h | taste - - | A P FM
retten - gerettet h | rescue - - | A P PA
helfen hilfst,hilft geholfen h | help - - | D P P
danken - gedankt h | thank - - | D P P
folgen - gefolgt s | follow - - | D PA PAV
antworten - geantwortet h | answer - - | D P P
zu_hören - zugehört h | listen_to - - | D P P
vertrauen - vertraut h | trust - - | D P P *
gratulieren - gratuliert h | congratulate - - | D P P
geben gibst,gibt gegeben h | give gave given | G P TRCF
zeigen - gezeigt h | show - shown | G P TRCV
schicken - geschickt h | send sent sent | G P RTC
leihen - geliehen h | lend lent lent | G P TRCV
erzählen - erzählt h | tell told told | G P t
an_bieten - angeboten h | offer - - | G P FMD
erklären - erklärt h | explain - - | O P X
zurück_geben gibst,gibt zurückgegeben h | return - - | O P TRC
vor_lesen liest,liest vorgelesen h | read_+aloud read read | O P R
warten - gewartet h | wait_for - - | auf+acc P PV
denken - gedacht h | think_of thought thought | an+acc P P
sprechen sprichst,spricht gesprochen h | speak_with spoke spoken | mit+dat P P
träumen - geträumt h | dream_of - - | von+dat P VBA
lachen - gelacht h | laugh_at - - | über+acc P PX
spielen - gespielt h | play_with - - | mit+dat PA Ai
telefonieren - telefoniert h | talk_on_the_phone_with - - | mit+dat P P
sich_freuen - gefreut h | look_forward_to - - | auf+acc P f
sich_interessieren - interessiert h | be_interested_in was been | für+acc P RXB *
sich_erinnern - erinnert h | remember - - | an+acc P PXB *
sich_kümmern - gekümmert h | take_care_of took taken | um+acc P PA
sich_verlieben - verliebt h | fall_in_love_with fell fallen | in+acc P P
sich_beschweren - beschwert h | complain_about - - | über+acc P PXF
auf_passen - aufgepasst h | look_after - - | auf+acc P PA
gehen - gegangen s | go went gone | L P
laufen läufst,läuft gelaufen s | run ran run | L PA
fahren fährst,fährt gefahren s | drive drove driven | L P
fliegen - geflogen s | fly flew flown | L P
reisen - gereist s | travel - - | L P
wissen weißt,weiß gewusst h | know knew known | C P
glauben - geglaubt h | believe - - | C P
sagen - gesagt h | say said said | C P
denken - gedacht h | think thought thought | C P
hoffen - gehofft h | hope - - | C P
versuchen - versucht h | try - - | Z P
versprechen versprichst,verspricht versprochen h | promise - - | Z P
beschließen - beschlossen h | decide - - | Z P
vor_haben hast,hat vorgehabt h | plan - - | Z P
"""

# Places: noun | preposition and English of "where" | of "where to".
PLACES = """
Garten in in in into
Park in in in to
Küche in in in into
Schule in at in to
Kirche in in in to
Museum in in in to
Hotel in in in to
Bahnhof an at zu to
Krankenhaus in in in to
Bibliothek in in in to
Theater in at in to
Kino in at in to
Restaurant in in in to
Supermarkt in in in to
Bäckerei in in in to
Büro in in in to
Stadt in in in to
Dorf in in in to
Wald in in in into
Strand an at an to
Fluss an by an to
See an by an to
Schloss in in in to
Fabrik in in in to
Universität an at zu to
Markt auf at auf to
Bauernhof auf on auf to
Insel auf on auf to
Brücke auf on auf onto
Zimmer in in in into
"""

# Compounds: modifiers with their linking element and English, then heads; every product is a word.
COMPOUNDS = (
    ("Schul=school Küchen=kitchen Büro=office Hotel=hotel Garten=garden Wohnungs=apartment "
     "Bibliotheks=library Museums=museum Theater=theater Bahnhofs=station Krankenhaus=hospital "
     "Kirchen=church Universitäts=university",
     "Tür Schlüssel Uhr Fenster Lampe Stuhl Tisch"),
    ("Schul=school Stadt=city Hotel=hotel Museums=museum Universitäts=university Dorf=village "
     "Krankenhaus=hospital Theater=theater",
     "Bus Garten Zeitung Gärtner Koch Bibliothek"),
    ("Winter=winter Sommer=summer Woll=wool Leder=leather Seiden=silk Arbeits=work",
     "Mantel Jacke Schuh Hut Kleid Rock Hemd Handschuh"),
    ("Apfel=apple Kirsch=cherry Zitronen=lemon Schokoladen=chocolate Karotten=carrot Bananen=banana "
     "Orangen=orange Erdbeer=strawberry",
     "Kuchen Keks Eis Pudding"),
    ("Tomaten=tomato Kartoffel=potato Zwiebel=onion Fisch=fish Käse=cheese Gemüse=vegetable Pilz=mushroom",
     "Suppe Salat Pizza"),
    ("Geburtstags=birthday Weihnachts=Christmas Oster=Easter Hochzeits=wedding Abschieds=farewell",
     "Geschenk Kuchen Lied Kerze Gedicht Brief Feier"),
    ("Holz=wooden Glas=glass Metall=metal Plastik=plastic Silber=silver Stein=stone Papier=paper",
     "Tisch Lampe Löffel Teller Ring Ball Schachtel"),
    ("Geschichts=history Kunst=art Musik=music Physik=physics Mathematik=math Chemie=chemistry "
     "Biologie=biology",
     "Lehrer Lehrerin Buch Prüfung Studentin Zeitschrift"),
    ("Polizei=police Spielzeug=toy Luxus=luxury Elektro=electric",
     "Auto Bus Zug Boot Schiff Flugzeug"),
)

MEN = "Peter Thomas Lukas Paul Jonas Felix Jürgen Max Karl Stefan Martin Günter".split()
WOMEN = "Anna Maria Julia Sabine Lena Sophie Katharina Emma Claudia Käthe Bärbel Laura".split()
KIN = "Vater Mutter Großvater Großmutter Bruder Schwester Onkel Tante Sohn Tochter".split()  # four come once
SURNAMES = "Müller Schmidt Schröder Fischer Jäger Krüger Köhler Wagner Becker Großmann".split()
TOWNS = ("Berlin=Berlin München=Munich Köln=Cologne Wien=Vienna Zürich=Zurich Hamburg=Hamburg Genf=Geneva "
         "Nürnberg=Nuremberg Prag=Prague Paris=Paris London=London Rom=Rome Mailand=Milan Venedig=Venice "
         "Österreich=Austria Frankreich=France Italien=Italy Spanien=Spain")
DAYS = ("Montag=Monday Dienstag=Tuesday Mittwoch=Wednesday Donnerstag=Thursday Freitag=Friday "
        "Samstag=Saturday Sonntag=Sunday")
MONTHS = ("Januar=January Februar=February März=March April=April Mai=May Juni=June Juli=July "
          "August=August September=September Oktober=October November=November Dezember=December")

# Adverbials of time by the tense that they ask for; "^" marks those that English puts before the verb.
TIMES = {
    "present": "immer=^always;oft=^often;manchmal=^sometimes;nie=^never;selten=^rarely;jeden Tag=every day;"
               "jeden Morgen=every morning;jede Woche=every week;jedes Jahr=every year;"
               "am Wochenende=on the weekend;im Winter=in the winter",
    "progressive": "gerade=right now;jetzt=now;heute=today;heute Abend=this evening",
    "soon": "morgen=tomorrow;morgen früh=tomorrow morning;übermorgen=the day after tomorrow;"
            "nächste Woche=next week;nächstes Jahr=next year;bald=soon",
    "past": "gestern=yesterday;gestern Abend=yesterday evening;vorgestern=the day before yesterday;"
            "letzte Woche=last week;letzten Sommer=last summer;letztes Jahr=last year",
}

PRONOUNS = {  # person: nominative, accusative, dative, reflexive, possessive stem; English subject, object, possessive
    "1s": ("ich", "mich", "mir", "mich", "mein", "I", "me", "my"),
    "2s": ("du", "dich", "dir", "dich", "dein", "you", "you", "your"),
    "3m": ("er", "ihn", "ihm", "sich", "sein", "he", "him", "his"),
    "3f": ("sie", None, "ihr", "sich", "ihr", "she", "her", "her"),  # accusative "sie": her or them
    "1p": ("wir", "uns", "uns", "uns", "unser", "we", "us", "our"),
    "2p": ("ihr", "euch", "euch", "euch", "euer", "you", "you", "your"),
    "3p": ("sie", None, "ihnen", "sich", "ihr", "they", "them", "their"),
}
CASES = ("nom", "acc", "dat", "gen")
DEFINITE = {"m": ("der", "den", "dem", "des"), "f": ("die", "die", "der", "der"),
            "n": ("das", "das", "dem", "des"), "p": ("die", "die", "den", "der")}
DIESER = {"m": ("er", "en", "em", "es"), "f": ("e", "e", "er", "er"),
          "n": ("es", "es", "em", "es"), "p": ("e", "e", "en", "er")}
EIN = {"m": ("", "en", "em", "es"), "f": ("e", "e", "er", "er"),
       "n": ("", "", "em", "es"), "p": ("e", "e", "en", "er")}
WEAK = {"m": ("e", "en", "en", "en"), "f": ("e", "e", "en", "en"),
        "n": ("e", "e", "en", "en"), "p": ("en", "en", "en", "en")}
MIXED = {"m": ("er", "en", "en", "en"), "f": ("e", "e", "en", "en"),
         "n": ("es", "es", "en", "en"), "p": ("en", "en", "en", "en")}
STRONG = {"m": ("er", "en", "em", "en"), "f": ("e", "e", "er", "er"),
          "n": ("es", "es", "em", "en"), "p": ("e", "e", "en", "er")}
DETERMINERS = {  # name: German stem, forms, adjective ending, English singular, English plural
    "def": ("", DEFINITE, WEAK, "the", "the"),
    "this": ("dies", DIESER, WEAK, "this", "these"),
    "every": ("jed", DIESER, WEAK, "every", None),
    "all": ("all", DIESER, WEAK, None, "all"),
    "a": ("ein", EIN, MIXED, "a", None),
    "no": ("kein", EIN, MIXED, "a", "any"),  # English negates the verb
    "many": ("viel", DIESER, STRONG, None, "many"),
    "some": ("einig", DIESER, STRONG, None, "some"),
    "which": ("welch", DIESER, WEAK, "which", "which"),
    "how many": ("wie viel", DIESER, STRONG, None, "how many"),
    "bare": ("", None, STRONG, "", ""),
}
CONTRACTED = {"in dem": "im", "in das": "ins", "an dem": "am", "an das": "ans", "zu dem": "zum",
              "zu der": "zur", "von dem": "vom"}
MODALS = {  # infinitive: singular present 1/3, 2; preterite stem; English kind and words: present, past
    "können": ("kann", "kannst", "konnte", "aux can", "aux could"),
    "müssen": ("muss", "musst", "musste", "lex have_to", "lex have_to"),
    "wollen": ("will", "willst", "wollte", "lex want_to", "lex want_to"),
    "dürfen": ("darf", "darfst", "durfte", "be allowed_to", "be allowed_to"),
    "sollen": ("soll", "sollst", None, "aux should", None),
    "möchten": ("möchte", "möchtest", None, "aux would like_to", None),
}
SEIN = {"1s": "bin", "2s": "bist", "3s": "ist", "1p": "sind", "2p": "seid", "3p": "sind"}
WAR = {"1s": "war", "2s": "warst", "3s": "war", "1p": "waren", "2p": "wart", "3p": "waren"}
HATTE = {"1s": "hatte", "2s": "hattest", "3s": "hatte", "1p": "hatten", "2p": "hattet", "3p": "hatten"}
HABEN = {"1s": "habe", "2s": "hast", "3s": "hat", "1p": "haben", "2p": "habt", "3p": "haben"}
WERDEN = {"1s": "werde", "2s": "wirst", "3s": "wird", "1p": "werden", "2p": "werdet", "3p": "werden"}
WURDE = {"1s": "wurde", "2s": "wurdest", "3s": "wurde", "1p": "wurden", "2p": "wurdet", "3p": "wurden"}
BE = {"1s": "am", "2s": "are", "3s": "is", "1p": "are", "2p": "are", "3p": "are"}
BEEN = {"1s": "was", "2s": "were", "3s": "was", "1p": "were", "2p": "were", "3p": "were"}

IMPERATIVES = dict(pair.split("=") for pair in (
    "lesen=lies geben=gib vergessen=vergiss helfen=hilf sprechen=sprich versprechen=versprich werfen=wirf "
    "treffen=triff essen=iss stehlen=stiehl sehen=sieh lächeln=lächle füttern=füttere kümmern=kümmere "
    "erinnern=erinnere laden=lad").split())

ONES_DE = ("null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
           "sechzehn siebzehn achtzehn neunzehn").split()
ONES_EN = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
           "sixteen seventeen eighteen nineteen").split()
TENS_DE = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
TENS_EN = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
DOUBLED = "swim run get put forget sit cut plan".split()  # English verbs that double their last letter


# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Noun:
    """A noun in both languages. ``head`` is the lemma it declines like; ``parts`` the combinations in it."""
    lemma: str
    gender: str
    genitive: str
    plural: str
    en: str
    en_plural: str
    classes: str
    head: str
    parts: tuple = ()

    def form(self, number, case):
        """German form for ``number`` "s" or "p" and ``case`` nom, acc, dat or gen."""
        if number == "p":
            return self.plural + ("n" if case == "dat" and self.plural[-1] not in "ns" else "")
        weak = self.gender == "m" and self.genitive[-1] == "n"
        return self.genitive if case == "gen" or (weak and case != "nom") else self.lemma


@dataclass(frozen=True)
class Verb:
    """A verb in both languages; ``prefix`` is the separable one, ``frame`` what it governs (see VERBS)."""
    lemma: str
    stem: str
    infinitive: str
    prefix: str
    reflexive: bool
    du: str
    er: str
    participle: str
    auxiliary: str
    en: str
    en_rest: str
    en_particle: str
    en_past: str
    en_participle: str
    frame: str
    subjects: str
    objects: str
    stative: bool

    def present(self, person):
        """German present without the separable prefix; ``person`` is one of 1s 2s 3s 1p 2p 3p."""
        t = "et" if self.stem[-1] in "dt" or self.stem[-3:] in ("chn", "ffn") else "t"
        if person == "1s":
            return {"wiss": "weiß", "lächel": "lächle"}.get(self.stem, self.stem + "e")
        if person == "2s":
            s = t if self.stem[-1] in "sßz" else ("est" if t == "et" else "st")
            return self.du or self.stem + s
        if person == "3s":
            return self.er or self.stem + t
        return self.stem + t if person == "2p" else self.infinitive

    def imperative(self):
        """German singular imperative without the separable prefix: lies, gib, warte, fahr."""
        if self.infinitive in IMPERATIVES:
            return IMPERATIVES[self.infinitive]
        return self.stem + ("e" if self.stem[-1] in "dt" or self.stem[-3:] in ("chn", "ffn") else "")

    def zu(self):
        """German infinitive with zu: zu lesen, aufzumachen."""
        return self.prefix + "zu" + self.infinitive if self.prefix else "zu " + self.infinitive

    def whole(self):
        """German infinitive with its prefix, without the reflexive pronoun."""
        return self.prefix + self.infinitive


@dataclass(frozen=True)
class Adjective:
    """An adjective in both languages; ``comparative`` is "" for one that is not compared."""
    lemma: str
    stem: str
    comparative: str
    en: str
    en_comparative: str
    classes: str

    def inflected(self, ending):
        """German attributive form; rosa and lila do not inflect."""
        return self.stem if self.stem in ("rosa", "lila") else self.stem + ending


@dataclass(frozen=True)
class Adverbial:
    """An adverbial in both languages; ``mid``: English puts it before the verb. ``parts`` as in Noun."""
    de: str
    en: str
    mid: bool = False
    parts: tuple = ()


@dataclass(frozen=True)
class Phrase:
    """A noun phrase: four German forms (nom, acc, dat, gen), English as subject and as object.

    ``person`` is 1s ... 3p; ``kind`` pronoun, name, definite, indefinite, none (kein) or quantified;
    ``owner`` the key of PRONOUNS that a possessive or a pronoun referring to it takes, or None.
    """
    forms: tuple
    en: str
    en_object: str
    person: str
    kind: str
    gender: str
    owner: str = None
    classes: str = ""
    head: str = ""
    parts: tuple = ()

    def de(self, case):
        """German form in ``case``."""
        return self.forms[CASES.index(case)]


@dataclass(frozen=True)
class Sentence:
    """A pair of sentences and the combinations (see ``held_out``) that occur in it."""
    de: str
    en: str
    parts: tuple = ()


def _english_s(base):
    """Regular -s of English nouns and verbs: box -> boxes, cherry -> cherries."""
    if base[-1] == "y" and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + ("es" if base[-1] in "sxz" or base[-2:] in ("ch", "sh") else "s")


def third_person(base):
    """English third person singular: go -> goes, have -> has."""
    return {"have": "has", "do": "does", "go": "goes"}.get(base) or _english_s(base)


def progressive(base):
    """English -ing form: take -> taking, run -> running, see -> seeing."""
    if base in DOUBLED:
        return base + base[-1] + "ing"
    return (base[:-1] if base[-1] == "e" and base[-2:] not in ("ee", "be") else base) + "ing"


def past_form(base):
    """English regular past: cry -> cried, plan -> planned, like -> liked."""
    if base in DOUBLED:
        return base + base[-1] + "ed"
    if base[-1] == "y" and base[-2] not in "aeiou":
        return base[:-1] + "ied"
    return base + ("d" if base[-1] == "e" else "ed")


def with_article(words):
    """Prefix English a or an by the sound that ``words`` begins with: an honest man, a useful tool."""
    sounds = words.lower()
    vowel = sounds[0] in "aeiou" and not sounds.startswith(("uni", "use"))
    return ("an " if vowel or sounds.startswith("honest") else "a ") + words


def number_words(n):
    """(German, English) words of 2 <= ``n`` <= 999: 21 -> (einundzwanzig, twenty-one). Else ValueError."""
    if not 2 <= n <= 999:
        raise ValueError(f"number {n!r} has no words here; valid are 2 to 999")
    de = en = ""
    if n >= 100:
        de, en = ONES_DE[n // 100] + "hundert", ONES_EN[n // 100] + " hundred"
        n %= 100
        if n == 0:
            return de, en
        if n == 1:
            return de + "eins", en + " one"
        en += " "
    if n < 20:
        return de + ONES_DE[n], en + ONES_EN[n]
    one_de = ONES_DE[n % 10] + "und" if n % 10 else ""
    one_en = "-" + ONES_EN[n % 10] if n % 10 else ""
    return de + one_de + TENS_DE[n // 10], en + TENS_EN[n // 10] + one_en


def _read_nouns():
    nouns = {}
    for line in NOUNS.strip().splitlines():
        lemma, gender, genitive, plural, english, classes = line.split()
        en, _, en_plural = english.replace("_", " ").partition(":")
        mass = plural == "-"
        nouns[lemma] = Noun(lemma, gender, genitive, "" if mass else plural, en,
                            "" if mass else en_plural or _english_s(en), classes, lemma)
    return nouns


def _read_adjectives():
    adjectives = {}
    for line in ADJECTIVES.strip().splitlines():
        lemma, stem, comparative, english, classes = line.split()
        en, _, en_comparative = english.replace("_", " ").partition(":")
        classes += "h" * ("T" in classes and "V" in classes) + "f" * ("R" in classes and "X" in classes)
        adjectives[lemma] = Adjective(lemma, stem, comparative.strip("-"), en, en_comparative, classes)
    return adjectives


def _read_verbs():
    verbs = {}
    for line in VERBS.strip().splitlines():
        german, english, use = (part.split() for part in line.split("|"))
        word, forms, participle, auxiliary = german
        reflexive = word.startswith("sich_")
        prefix, _, infinitive = word.removeprefix("sich_").rpartition("_")
        stem = infinitive[:-2] if infinitive.endswith("en") else infinitive[:-1]
        du, _, er = forms.strip("-").partition(",")
        base, *rest = english[0].split("_")
        particle = "".join(w[1:] for w in rest if w[0] == "+")
        past = past_form(base) if english[1] == "-" else english[1]
        lemma = ("sich " if reflexive else "") + prefix + infinitive
        frame, subjects = use[0], use[1]
        key = lemma + (" " + frame.split("+")[0] if "+" in frame else "")
        key = f"{key} {frame}" if key in verbs else key
        verbs[key] = Verb(lemma, stem, infinitive, prefix, reflexive, du, er, participle, auxiliary, base,
                          " ".join(w for w in rest if w[0] != "+"), particle, past,
                          past if english[2] == "-" else english[2], frame, subjects,
                          use[2] if len(use) > 2 and use[2] != "*" else "", use[-1] == "*")
    return verbs


def _pairs(table):
    return tuple(tuple(entry.split("=")) for entry in table.split())


_COMPOUND_RANK = {}  # (modifier, head) -> the number that ``held_out`` takes modulo 5


def _read_compounds():
    compounds = {}
    for group, (modifiers, heads) in enumerate(COMPOUNDS):
        for j, head in enumerate(heads.split()):
            for i, (stem, english) in enumerate(_pairs(modifiers)):
                _COMPOUND_RANK[stem, head] = group + i + j
                noun = NOUN[head]
                join = stem + head.lower()
                ending = noun.genitive.removeprefix(head) if noun.genitive.startswith(head) else None
                assert ending is not None, head
                compounds[join] = replace(
                    noun, lemma=join, genitive=join + ending, plural=noun.plural and stem + noun.plural.lower(),
                    en=f"{english} {noun.en}", en_plural=noun.en_plural and f"{english} {noun.en_plural}",
                    parts=(("compound", stem, head),))
    return compounds


NOUN = _read_nouns()
ADJECTIVE = _read_adjectives()
VERB = _read_verbs()
COMPOUND = _read_compounds()
PLACE = {line.split()[0]: line.split()[1:] for line in PLACES.strip().splitlines()}
VERB["sein"] = Verb("sein", "sei", "sein", "", False, "bist", "ist", "gewesen", "s", "be", "", "", "was",
                    "been", "I", "PA", "", True)


# --------------------------------------------------------------------------------------------------
# What is held out
# --------------------------------------------------------------------------------------------------
def _rank(table):
    return {key: i for i, key in enumerate(table)}


_NOUN, _ADJECTIVE = _rank(NOUN), _rank(ADJECTIVE)


def held_out(part):
    """True if the combination ``part`` belongs to the test set alone.

    ``part`` is one of
    ``("compound", modifier, head)``: held out if (g + i + j) % 5 == 0 for modifier i and head j of row g of
    COMPOUNDS, so no modifier and no head loses all its compounds;
    ``("number", n)``: held out if its last two digits t, u (t >= 2, u >= 1) have (3 t + u) % 5 == 0, or if
    n > 100 and (n // 100 + n % 100) % 5 == 0, so no training number contains a held-out two-digit one;
    ``("adjective", adjective, head noun)``: held out if (rank of adjective + rank of noun) % 10 == 0, where
    attribute and predicate count alike and a compound counts as its head.
    Ranks are line numbers in the lexicon, from 0.
    """
    kind = part[0]
    if kind == "compound":
        return _COMPOUND_RANK[part[1], part[2]] % 5 == 0
    if kind == "adjective":
        return (_ADJECTIVE[part[1]] + _NOUN[part[2]]) % 10 == 0
    n = part[1]
    tens, ones = n % 100 // 10, n % 10
    if tens >= 2 and ones and (3 * tens + ones) % 5 == 0:
        return True
    return n > 100 and (n // 100 + n % 100) % 5 == 0


# --------------------------------------------------------------------------------------------------
# Phrases
# --------------------------------------------------------------------------------------------------
def pronoun(key):
    """The personal pronoun ``key`` of PRONOUNS as a Phrase (no accusative for the ambiguous sie)."""
    nom, acc, dat, _, _, en, en_object, _ = PRONOUNS[key]
    person = "3s" if key in ("3m", "3f") else key
    return Phrase((nom, acc, dat, None), en, en_object, person, "pronoun", key[1], key, "P")


def name(word, key, english=None, oblique=None):
    """A person's name; ``key`` 3m or 3f says which pronoun refers to it."""
    forms = (word, oblique or word, oblique or word, None)
    return Phrase(forms, english or word, english or word, "3s", "name", key[1], key, "P")


def genitive_name(phrase):
    """The name as a German possessor: Annas, but Lukas'."""
    return phrase.forms[1] + ("'" if phrase.forms[1][-1] in "sßxz" else "s")


def english_possessor(phrase):
    """The phrase as an English possessor: the boy's, the boys', Lukas's."""
    plural_s = phrase.person == "3p" and phrase.en[-1] == "s"
    return phrase.en + ("'" if plural_s else "'s")


def noun_phrase(noun, determiner="def", adjective=None, number="s", owner=None):
    """The noun phrase of ``noun`` in both languages.

    ``determiner``: a key of DETERMINERS, a number >= 2, a key of PRONOUNS (possessive) or a Phrase (the
    possessor). ``number``: "s" or "p". Raises ValueError for a number, determiner or noun that do not fit.
    """
    if isinstance(determiner, int) or determiner in ("all", "many", "some", "how many"):
        number = "p"
    if number == "p" and not noun.plural or number == "p" and determiner in ("a", "every"):
        raise ValueError(f"determiner {determiner!r} does not fit {noun.lemma!r} in number {number!r}")
    gender = "p" if number == "p" else noun.gender
    parts = list(noun.parts)
    after, kind, fixed = "", "definite", None
    if isinstance(determiner, int):
        words, english = number_words(determiner)
        parts.append(("number", determiner))
        fixed, endings, kind = [words] * 4, STRONG[gender], "quantified"
    elif isinstance(determiner, Phrase):
        parts.extend(determiner.parts)
        english = english_possessor(determiner)
        if determiner.kind == "name":
            fixed, endings = [genitive_name(determiner)] * 4, STRONG[gender]
        else:
            fixed, endings, after = DEFINITE[gender], WEAK[gender], " " + determiner.de("gen")
    elif determiner in PRONOUNS:
        stem = PRONOUNS[determiner][4]
        fixed = [("eur" if stem == "euer" and e else stem) + e for e in EIN[gender]]
        endings, english = MIXED[gender], PRONOUNS[determiner][7]
    elif determiner in DETERMINERS:
        stem, table, ends, singular, plural = DETERMINERS[determiner]
        fixed = [stem + e for e in table[gender]] if table else [""] * 4
        endings, english = ends[gender], plural if number == "p" else singular
        if determiner == "no" and not noun.plural:
            english = "any"
        kind = {"a": "indefinite", "bare": "indefinite", "no": "none", "every": "quantified", "all": "quantified",
                "many": "quantified", "some": "quantified"}.get(determiner, kind)
    else:
        raise ValueError(f"determiner {determiner!r} is unknown; valid are {sorted(DETERMINERS)}, "
                         f"{sorted(PRONOUNS)}, a number or a Phrase")
    forms = []
    for case, word, ending in zip(CASES, fixed, endings):
        if adjective:
            word = f"{word} {adjective.inflected(ending)}"
        forms.append(f"{word} {noun.form(number, case)}{after}".strip())
    english_noun = noun.en_plural if number == "p" else noun.en
    if adjective:
        parts.append(("adjective", adjective.lemma, noun.head))
        english_noun = f"{adjective.en} {english_noun}"
    en = with_article(english_noun) if english == "a" else f"{english} {english_noun}".strip()
    subject = f"no {english_noun}" if determiner == "no" else en
    return Phrase(tuple(forms), subject, en, "3" + number, kind, gender, owner, noun.classes, noun.head, tuple(parts))


def contract(text):
    """Contract German preposition and article at the start of ``text``: in dem Park -> im Park."""
    two = " ".join(text.split()[:2])
    return CONTRACTED[two] + text[len(two):] if two in CONTRACTED else text


def location(phrase):
    """Where: im Park -> in the park. ``phrase`` must be of a noun in PLACES."""
    preposition, english = PLACE[phrase.head][:2]
    return Adverbial(contract(f"{preposition} {phrase.de('dat')}"), f"{english} {phrase.en_object}", parts=phrase.parts)


def direction(phrase):
    """Where to: in den Park -> to the park. ``phrase`` must be of a noun in PLACES."""
    preposition, english = PLACE[phrase.head][2:]
    case = "dat" if preposition == "zu" else "acc"
    return Adverbial(contract(f"{preposition} {phrase.de(case)}"), f"{english} {phrase.en_object}", parts=phrase.parts)


def adverbials(tense):
    """The adverbials of TIMES that go with ``tense``."""
    pairs = (entry.split("=") for entry in TIMES[tense].split(";"))
    return [Adverbial(de, en.lstrip("^"), en[0] == "^") for de, en in pairs]


# --------------------------------------------------------------------------------------------------
# Clauses
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Clause:
    """A clause before word order. ``tense``: present, progressive, soon, future, past or perfect.

    ``objects``: dative before accusative; ``modal``: a key of MODALS, or "gern"; ``aspect`` (perfect only):
    schon, noch nicht or noch nie; ``goal`` a direction or the predicate of sein; ``gap``: the object of the
    frame is left out (it is a question word or a relative pronoun at the front).
    """
    subject: Phrase
    verb: Verb
    tense: str = "present"
    objects: tuple = ()
    time: Adverbial = None
    place: Adverbial = None
    goal: Adverbial = None
    modal: str = None
    aspect: str = None
    negated: bool = False
    gap: bool = False

    @property
    def parts(self):
        """Combinations in the clause, for ``held_out``."""
        found = [self.subject, *self.objects, self.time, self.place, self.goal]
        return tuple(part for item in found if item for part in item.parts)


def german_verb(clause):
    """(finite verb, separable prefix, words of the right bracket) of the clause."""
    verb, person, tense = clause.verb, clause.subject.person, clause.tense
    if clause.modal and clause.modal != "gern":
        first, du, preterite = MODALS[clause.modal][:3]
        if tense == "past":
            ends = {"1s": "", "2s": "st", "3s": "", "1p": "n", "2p": "t", "3p": "n"}
            return preterite + ends[person], "", [verb.whole()]
        plural = {"1p": clause.modal, "2p": clause.modal[:-1].removesuffix("e") + ("et" if clause.modal == "möchten"
                  else "t"), "3p": clause.modal}
        finite = {"1s": first, "2s": du, "3s": first, **plural}[person]
        return finite, "", [verb.whole()]
    if tense == "future":
        return WERDEN[person], "", [verb.whole()]
    if tense == "past" and verb.lemma in ("sein", "haben"):
        return (WAR if verb.lemma == "sein" else HATTE)[person], "", []
    if tense in ("past", "perfect"):
        return (HABEN if verb.auxiliary == "h" else SEIN)[person], "", [verb.participle]
    return (SEIN[person] if verb.lemma == "sein" else verb.present(person)), verb.prefix, []


def german_middle(clause):
    """The middle field without the subject: pronouns, time, nouns, nicht, place, prepositional object, goal."""
    verb = clause.verb
    pronouns, nouns, late = [], [], []
    if verb.reflexive:
        key = clause.subject.owner if clause.subject.kind == "pronoun" else None
        pronouns.append(PRONOUNS[key][3] if key else "sich")
    cases = {"A": ("acc",), "D": ("dat",), "G": ("dat", "acc"), "O": ("dat", "acc")}.get(verb.frame, ())
    if "+" in verb.frame:
        preposition, case = verb.frame.split("+")
        late = [contract(f"{preposition} {phrase.de(case)}") for phrase in clause.objects]
    else:
        for phrase, case in zip(clause.objects, cases):
            (pronouns if phrase.kind == "pronoun" else nouns).append(phrase.de(case))
    slot = clause.aspect or ("nicht" if clause.negated and not any(o.kind == "none" for o in clause.objects) else "")
    gladly = ["gern"] if clause.modal == "gern" else []
    middle = [*pronouns, clause.time and clause.time.de, *gladly, *nouns, slot,
              clause.place and clause.place.de, *late, clause.goal and clause.goal.de]
    return [text for text in middle if text]


def german_main(clause, front=None):
    """Verb-second clause; ``front`` (already taken out of ``clause``) stands first, else the subject does."""
    finite, prefix, bracket = german_verb(clause)
    subject = clause.subject.de("nom")
    head = [front, finite, subject] if front else [subject, finite]
    return " ".join([*head, *german_middle(clause), *([prefix] if prefix else []), *bracket])


def german_verb_first(clause):
    """Verb-first clause, as in a yes/no question."""
    finite, prefix, bracket = german_verb(clause)
    return " ".join([finite, clause.subject.de("nom"), *german_middle(clause), *([prefix] if prefix else []), *bracket])


def german_final(clause):
    """Verb-final clause without its conjunction: der Zug heute ankommt."""
    finite, prefix, bracket = german_verb(clause)
    return " ".join([clause.subject.de("nom"), *german_middle(clause), *bracket, prefix + finite])


def english_verb(clause):
    """(finite word, it is an auxiliary or be, following words) of the clause, before negation."""
    verb, person, tense = clause.verb, clause.subject.person, clause.tense
    base, past, participle = verb.en, verb.en_past, verb.en_participle
    rest = verb.en_rest.split()
    if clause.modal:
        kind, *words = ("lex like_to" if clause.modal == "gern" else
                        MODALS[clause.modal][4 if tense == "past" else 3]).replace("_", " ").split()
        if kind == "be":
            return (BEEN if tense == "past" else BE)[person], True, [*words, base, *rest]
        if kind == "aux":
            return words[0], True, [*words[1:], base, *rest]
        rest = [*words[1:], base, *rest]
        base, past = words[0], {"have": "had"}.get(words[0]) or past_form(words[0])
    if tense in ("soon", "future"):
        return "will", True, [base, *rest]
    if tense == "progressive" and base != "be":
        return BE[person], True, [progressive(base), *rest]
    if tense == "perfect":
        return "has" if person == "3s" else "have", True, [participle, *rest]
    if base == "be":
        return (BEEN if tense == "past" else BE)[person], True, rest
    if tense == "past":
        return past, False, rest
    return third_person(base) if person == "3s" else base, False, rest


def english(clause, question=False, front=""):
    """English clause; ``question`` inverts, with do where there is no auxiliary; ``front`` precedes it all."""
    finite, auxiliary, rest = english_verb(clause)
    person = clause.subject.person
    negated = clause.negated or clause.aspect == "noch nicht"
    if not auxiliary and (negated or question):
        base = _modal_base(clause) if clause.modal else clause.verb.en
        rest = [base, *rest]
        finite = "did" if clause.tense == "past" else "does" if person == "3s" else "do"
        auxiliary = True
    adverb = {"schon": "already", "noch nie": "never"}.get(clause.aspect, "")
    if clause.time and clause.time.mid:
        adverb = clause.time.en
    subject = clause.subject.en
    if negated:
        finite = {"am": "am not", "can": "can't", "will": "won't"}.get(finite) or finite + "n't"
    if question:
        words = [finite, subject, adverb, *rest]
    else:
        short = {"am": "'m", "is": "'s", "are": "'re", "have": "'ve", "has": "'s", "will": "'ll", "would": "'d"}
        first, *more = finite.split()
        if auxiliary and clause.subject.kind == "pronoun" and first in short:
            words = [" ".join([subject + short[first], *more])]
        else:
            words = [subject, finite] if auxiliary or not adverb else [subject, adverb, finite]
        words += [adverb if auxiliary else "", *rest]
    words += _english_objects(clause)
    words += [clause.goal and clause.goal.en, clause.place and clause.place.en]
    words += [clause.time.en if clause.time and not clause.time.mid else "", "yet" * (clause.aspect == "noch nicht")]
    return " ".join(word for word in [front, *words] if word)


def _modal_base(clause):
    if clause.modal == "gern":
        return "like"
    return MODALS[clause.modal][3].replace("_", " ").split()[1]


def _english_objects(clause):
    particle, frame = clause.verb.en_particle, clause.verb.frame
    texts = [phrase.en_object for phrase in clause.objects]
    if frame == "O" and len(texts) == 2:
        return [word for word in (texts[1], particle, "to", texts[0]) if word]
    if not particle:
        return texts
    if texts and clause.objects[-1].kind != "pronoun":
        return [particle, *texts]
    return [*texts, particle]


# --------------------------------------------------------------------------------------------------
# Sentences
# --------------------------------------------------------------------------------------------------
def finish(de, en, mark, parts):
    """Capitalize, add the sentence-final ``mark`` and tidy the commas that German clauses leave."""
    de = (de + mark).replace(",,", ",").replace(",.", ".").replace(",?", "?").replace(",!", "!")
    return Sentence(_capital(de), _capital(en + mark), tuple(parts))


def _capital(text):
    i = 1 if text[0] in '"„' else 0
    return text[:i] + text[i].upper() + text[i + 1:]


def statement(clause, front=None):
    """A main clause; ``front`` "time" or "object" puts that German constituent first."""
    if front == "time":
        rest = replace(clause, time=None)
        return finish(german_main(rest, clause.time.de), english(rest, front=clause.time.en), ".", clause.parts)
    if front == "object":
        rest = replace(clause, objects=())
        case = "dat" if clause.verb.frame == "D" else "acc"
        return finish(german_main(rest, clause.objects[0].de(case)), english(clause), ".", clause.parts)
    return finish(german_main(clause), english(clause), ".", clause.parts)


def question(clause):
    """A yes/no question."""
    return finish(german_verb_first(clause), english(clause, question=True), "?", clause.parts)


def wh_question(clause, de, en, parts=()):
    """A question with ``de``/``en`` in front; what they ask for is missing in ``clause``."""
    return finish(f"{de} {german_verb_first(clause)}", english(clause, question=True, front=en), "?",
                  clause.parts + tuple(parts))


def subject_question(clause):
    """A question whose subject is the question word: Wer hat das Fenster aufgemacht?"""
    return finish(german_main(clause), english(clause), "?", clause.parts)


def imperative(clause, plural=False, polite=False):
    """A command to du (or ihr with ``plural``); the subject of ``clause`` must be that pronoun."""
    verb = clause.verb
    finite = verb.present("2p") if plural else verb.imperative()
    de = [*(["bitte"] if polite else []), finite, *german_middle(clause), *([verb.prefix] if verb.prefix else [])]
    words = [verb.en, *verb.en_rest.split(), *_english_objects(clause)]
    words += [item.en for item in (clause.goal, clause.place, clause.time) if item]
    en = [*(["please"] if polite else []), *(["don't"] if clause.negated else []), *words]
    return finish(" ".join(de), " ".join(en), "!", clause.parts)


CONJUNCTIONS = {"weil": "because", "dass": "that", "wenn": "if", "obwohl": "although", "ob": "whether",
                "bevor": "before", "während": "while"}


def complex_sentence(main, conjunction, clause, first=False, mark="."):
    """Main clause and subordinate clause; with ``first`` the subordinate clause comes first (verb second)."""
    sub_de = f"{conjunction} {german_final(clause)}"
    sub_en = f"{CONJUNCTIONS[conjunction]} {english(clause)}"
    parts = main.parts + clause.parts
    if first:
        return finish(german_main(main, sub_de + ","), f"{sub_en}, {english(main)}", mark, parts)
    return finish(f"{german_main(main)}, {sub_de}", f"{english(main)} {sub_en}", mark, parts)


def relative(phrase, clause, case):
    """``phrase`` with a relative clause; ``clause`` has the relative pronoun as subject ("nom") or a gap ("acc")."""
    who = "who" if "P" in phrase.classes else "that"
    word = DEFINITE[phrase.gender][CASES.index(case)]
    if case == "nom":
        clause = replace(clause, subject=replace(phrase, forms=(word,) * 4, en=who, kind="relative", parts=()))
        de, en = german_final(clause), english(clause)
    else:
        de, en = f"{word} {german_final(clause)}", f"{who} {english(clause)}"
    return replace(phrase, forms=tuple(f"{form}, {de}," for form in phrase.forms), en=f"{phrase.en} {en}",
                   en_object=f"{phrase.en_object} {en}", parts=phrase.parts + clause.parts)


def infinitive(main, clause, purpose=False):
    """Main clause and an infinitive with zu (or um ... zu): the subject of both is the same."""
    verb = clause.verb
    de = " ".join([*(["um"] if purpose else []), *german_middle(clause), verb.zu()])
    words = [verb.en, *verb.en_rest.split(), *_english_objects(clause)]
    words += [item.en for item in (clause.goal, clause.place, clause.time) if item]
    return finish(f"{german_main(main)}, {de}", f"{english(main)} to {' '.join(words)}", ".", main.parts + clause.parts)


def passive(patient, verb, agent=None, time=None):
    """Preterite passive: Das Haus wurde vom Bäcker verkauft."""
    by = contract(f"von {agent.de('dat')}") if agent else ""
    de = [patient.de("nom"), WURDE[patient.person], time and time.de, by, verb.participle]
    en = [patient.en, BEEN[patient.person], verb.en_participle, verb.en_particle,
          agent and f"by {agent.en_object}", time and time.en]
    parts = [part for item in (patient, agent, time) if item for part in item.parts]
    return finish(" ".join(w for w in de if w), " ".join(w for w in en if w), ".", parts)


def quotation(pair, speaker):
    """Direct speech: „Ich bin müde“, sagt Anna. -> "I'm tired," Anna says. Questions are asked (fragt)."""
    de, mark, en = pair.de, pair.de[-1], pair.en
    de = de[:-1] if mark == "." else de
    en = en[:-1] + "," if mark == "." else en
    verb = VERB["fragen" if mark == "?" else "sagen"]
    finite = verb.present(speaker.person)
    says = third_person(verb.en) if speaker.person == "3s" else verb.en
    return Sentence(f"„{de}“, {finite} {speaker.de('nom')}.", f'"{en}" {speaker.en} {says}.',
                    pair.parts + speaker.parts)


def coordination(first, conjunction, second):
    """Two main clauses joined by und, aber or denn."""
    english_word = {"und": "and", "aber": "but", "denn": "for"}[conjunction]
    comma = "" if conjunction == "und" else ","
    return finish(f"{german_main(first)}{comma} {conjunction} {german_main(second)}",
                  f"{english(first)}, {english_word} {english(second)}", ".", first.parts + second.parts)


# --------------------------------------------------------------------------------------------------
# Chance
# --------------------------------------------------------------------------------------------------
class Dice:
    """Choices made from ``random.Random(seed).random()`` alone, the one method whose sequence is guaranteed."""

    def __init__(self, seed):
        self._random = random.Random(seed).random

    def index(self, n):
        """An integer in [0, n)."""
        return int(self._random() * n)

    def pick(self, items):
        """One item of a sequence."""
        return items[self.index(len(items))]

    def chance(self, p):
        """True with probability ``p``."""
        return self._random() < p

    def weighted(self, choices):
        """One key of a dict of integer weights."""
        left = self.index(sum(choices.values()))
        for key, weight in choices.items():
            left -= weight
            if left < 0:
                return key
        raise AssertionError("unreachable: the weights sum to more than the index")


def _group(items, letters):
    return tuple(item for item in items if any(letter in letters for letter in item.classes))


_BY_HEAD = {}
for _noun in COMPOUND.values():
    _BY_HEAD.setdefault(_noun.head, []).append(_noun)
_FITTING = {}  # classes -> nouns or adjectives, filled on demand


def _fitting(table, classes):
    key = (table is NOUN, classes)
    if key not in _FITTING:
        _FITTING[key] = _group(table.values(), classes)
    return _FITTING[key]


def draw_noun(dice, classes):
    """A noun of one of ``classes``, often a compound where there is one."""
    noun = dice.pick(_fitting(NOUN, classes))
    if noun.lemma in _BY_HEAD and dice.chance(0.7):
        return dice.pick(_BY_HEAD[noun.lemma])
    return noun


def draw_adjective(dice, noun, compared=False):
    """An adjective that fits ``noun`` (with a comparative if ``compared``), or None."""
    fitting = [a for a in _fitting(ADJECTIVE, noun.classes) if a.comparative or not compared]
    return dice.pick(fitting) if fitting else None


def draw_number(dice, top=99):
    """A number from 2 to ``top`` (99 or 999) that a number word is made for; hundreds never end in 01."""
    if top > 99 and dice.chance(0.4):
        n = 100 * (1 + dice.index(9)) + dice.index(100)
        return n + 1 if n % 100 == 1 else n
    return 2 + dice.index(11) if dice.chance(0.35) else 13 + dice.index(87)


def draw_name(dice):
    """The name of a person: Anna, Herr Müller."""
    if dice.chance(0.3):
        surname = dice.pick(SURNAMES)
        if dice.chance(0.5):
            return name("Herr " + surname, "3m", "Mr. " + surname, "Herrn " + surname)
        return name("Frau " + surname, "3f", "Ms. " + surname)
    return name(dice.pick(WOMEN), "3f") if dice.chance(0.5) else name(dice.pick(MEN), "3m")


def draw_phrase(dice, classes, owner=None, role="object", plain=False):
    """A noun phrase of a noun of ``classes``.

    ``role``: subject, object (accusative), oblique or negated (the object of a negated verb);
    ``owner``: the possessive that refers to the subject; ``plain``: no adjective.
    """
    noun = draw_noun(dice, classes)
    adjective = None if plain or not dice.chance(0.4) else draw_adjective(dice, noun)
    person = any(c in noun.classes for c in "PA")
    if not noun.plural:
        choices = {"def": 3, "this": 1}
        if role in ("object", "negated") and not person:
            choices = {"def": 2, "this": 1, "bare": 5} if role == "object" else {"def": 2, "no": 5}
        return noun_phrase(noun, dice.weighted(choices), adjective)
    choices = {"def": 38, "this": 8, "poss": 14, "of": 6, "own": 14 if owner else 0}
    if noun.lemma in KIN:  # not "a mother" or "73 fathers": a brother is somebody's
        choices = {"def": 2, "poss": 6, "of": 3, "own": 6 if owner else 0}
    elif noun.lemma in ("Mann", "Frau"):  # meine Frau would be my wife
        choices = {"def": 5, "this": 1}
    if role == "negated":
        choices["no"] = 35
    elif noun.lemma not in KIN:
        choices |= {"a": 22, "count": 9, "many": 3, "some": 3, "bare": 6 if role == "object" else 0}
        choices |= {"all": 3, "every": 3, "no": 2} if role == "subject" else {}
    kind = dice.weighted(choices)
    number = "p" if dice.chance(0.3) and kind not in ("a", "every") and noun.lemma not in KIN[:4] else "s"
    key = None
    if "P" in noun.classes:
        key = "3p" if number == "p" else {"m": "3m", "f": "3f"}.get(noun.gender)
    if kind == "poss":
        kind = dice.pick(("1s", "1s", "2s", "1p", "2p"))
    elif kind == "own":
        kind = owner
    elif kind == "count":
        kind, number = draw_number(dice), "p"
    elif kind == "of":
        kind = draw_name(dice) if dice.chance(0.6) else noun_phrase(
            dice.pick(_fitting(NOUN, "P")), "def", None, "p" if dice.chance(0.2) else "s")
    elif kind in ("all", "many", "some", "bare"):
        number = "p"
    if kind == "no":
        number = "s" if role == "subject" else number
    if "P" in noun.classes and number == "p":
        key = "3p"
    return noun_phrase(noun, kind, adjective, number, None if kind == "no" else key)


def draw_subject(dice, classes, plain=False):
    """A subject of ``classes`` (P, A or PA): pronoun, name or noun phrase."""
    if classes == "PA" and dice.chance(0.35):
        classes = "A"
    if "P" in classes:
        classes = "P"
        if dice.chance(0.28):
            return pronoun(dice.pick(tuple(PRONOUNS)))
        if dice.chance(0.2):
            return draw_name(dice)
    return draw_phrase(dice, classes, role="subject", plain=plain)


def draw_time(dice, tense):
    """An adverbial of time that fits ``tense``."""
    number = draw_number(dice)
    plain = dice.pick(adverbials({"future": "soon"}.get(tense, tense)))
    if tense in ("present", "progressive"):
        return plain
    unit_de, unit_en = dice.pick(_pairs("Tagen=days Wochen=weeks Monaten=months Jahren=years"))
    day, month, hour = dice.pick(_pairs(DAYS)), dice.pick(_pairs(MONTHS)), 2 + dice.index(11)
    minutes, date = dice.pick(("00", "15", "30", "45")), 1 + dice.index(28)
    de, en = number_words(number)
    kind = dice.weighted({"plain": 5, "count": 4, "day": 2, "month": 1, "clock": 2, "half": 1, "quarter": 1,
                          "digits": 1, "date": 1})
    if kind == "plain" or tense == "soon" and kind != "count":
        return plain
    if kind == "count":
        ago = (f"vor {de} {unit_de}", f"{en} {unit_en} ago")
        coming = (f"in {de} {unit_de}", f"in {en} {unit_en}")
        return Adverbial(*(ago if tense == "past" else coming), parts=(("number", number),))
    return Adverbial(*{
        "day": (f"am {day[0]}", f"on {day[1]}"),
        "month": (f"im {month[0]}", f"in {month[1]}"),
        "clock": (f"um {ONES_DE[hour]} Uhr", f"at {ONES_EN[hour]} o'clock"),
        "half": (f"um halb {ONES_DE[hour]}", f"at half past {ONES_EN[(hour - 2) % 12 + 1]}"),
        "quarter": (f"um Viertel nach {ONES_DE[hour]}", f"at a quarter past {ONES_EN[hour]}"),
        "digits": (f"um {hour + 6}.{minutes} Uhr", f"at {hour + 6}:{minutes}"),
        "date": (f"am {date}. {month[0]}", f"on {month[1]} {date}"),
    }[kind])


def draw_place(dice):
    """The phrase of a place: der Park, eine alte Kirche."""
    noun = NOUN[dice.pick(tuple(PLACE))]
    adjective = draw_adjective(dice, noun) if dice.chance(0.3) else None
    return noun_phrase(noun, dice.weighted({"def": 6, "this": 1, "a": 1}), adjective)


def _verbs(frames):
    return [v for v in VERB.values() if v.lemma != "sein" and (v.frame in frames or "+" in frames and "+" in v.frame)]


_VERBS_OF = {frames: _verbs(frames) for frames in ("I", "A", "D", "GO", "+", "L", "C", "Z")}
TENSES = {"present": 26, "progressive": 10, "soon": 8, "future": 7, "past": 30, "perfect": 7, "modal": 12,
          "modal past": 5, "gern": 4}


def draw_clause(dice, subject=None, frames=None, tenses=None, verb=None, plain=False, positive=False, owner=None):
    """A clause; each argument that is given replaces that choice. ``plain``: short phrases, no adverbials."""
    verb = verb or dice.pick(_VERBS_OF[frames or dice.weighted({"I": 18, "A": 40, "D": 8, "GO": 12, "+": 12, "L": 9})])
    subject = subject or draw_subject(dice, verb.subjects, plain=plain)
    owner = owner or subject.owner
    tenses = tenses or TENSES
    if verb.stative:
        tenses = {k: w for k, w in (("present", 6), ("past", 2)) if k in tenses}
    kind = dice.weighted(tenses)
    tense, modal, aspect, time = kind, None, None, None
    if kind.startswith("modal"):
        tense = "past" if kind == "modal past" else "present"
        modal = dice.pick(tuple(m for m in MODALS if tense == "present" or MODALS[m][2]))
    if kind == "gern" and (verb.frame not in "IA" or verb.lemma in ("sich verlaufen", "verlieren", "vergessen")):
        kind = tense = "present"
    if kind == "gern":
        tense, modal = "present", "gern"
    if kind == "perfect":
        aspect = dice.pick(("schon", "noch nicht", "noch nie"))
    if kind in ("progressive", "soon"):
        time = draw_time(dice, tense)
    elif not verb.stative and not plain and kind not in ("gern", "perfect") and dice.chance(0.4):
        time = draw_time(dice, "future" if kind == "modal" else tense)
    limited = subject.kind in ("none", "quantified") or modal in ("gern", "möchten") or aspect or time and time.mid
    negated = not limited and not positive and dice.chance(0.2)
    objects, goal, place = (), None, None
    if verb.frame in "AD" or "+" in verb.frame:
        role = "oblique" if verb.frame != "A" else "negated" if negated else "object"
        if modal == "gern" or aspect:
            noun = draw_noun(dice, verb.objects)
            if modal == "gern":
                objects = (noun_phrase(noun, "bare", None, "p" if noun.plural else "s"),)
            else:
                objects = (noun_phrase(noun, dice.pick(("def", "this"))),)
        else:
            objects = (_draw_object(dice, verb.objects, subject, role, owner, plain,
                                    "dat" if verb.frame == "D" or verb.frame.endswith("dat") else "acc", negated),)
    elif verb.frame in "GO":
        receiver = _draw_object(dice, "P", subject, "oblique", owner, True, "dat", negated)
        role = "oblique" if negated or aspect or verb.frame == "O" else "object"
        thing = draw_phrase(dice, verb.objects, owner, role, plain)
        if (negated or aspect) and thing.kind != "definite":
            thing = noun_phrase(draw_noun(dice, verb.objects), "def")
        objects = (receiver, thing)
    elif verb.frame == "L":
        towns = verb.lemma in ("fahren", "fliegen", "reisen")
        if towns and (verb.lemma != "fahren" or dice.chance(0.5)):
            town = dice.pick(_pairs(TOWNS))
            goal = Adverbial("nach " + town[0], "to " + town[1])
        else:
            goal = direction(draw_place(dice))
    if verb.frame == "I" and not plain and verb.lemma not in ("aufstehen", "zurückkommen", "umziehen", "ausgehen",
                                                               "sich beeilen") and dice.chance(0.35):
        place = location(draw_place(dice))
    if negated and time and kind == "present":
        time = None  # the scope of "not" and "every day" would be open
    if negated and objects and objects[-1].kind in ("indefinite", "quantified"):
        negated = False
    return Clause(subject, verb, tense, objects, time, place, goal, modal, aspect, negated)


def _draw_object(dice, classes, subject, role, owner, plain, case, negated):
    if "P" in classes and dice.chance(0.3):
        person = subject.person[0]
        keys = [key for key in PRONOUNS if PRONOUNS[key][1 if case == "acc" else 2] and key[0] != person]
        if subject.kind != "pronoun" or person != "3":
            keys = keys + [key for key in ("3m",) if subject.kind != "pronoun"]
        if subject.kind not in ("relative",) and keys and dice.chance(0.7):
            return pronoun(dice.pick(keys))
        return draw_name(dice)
    phrase = draw_phrase(dice, classes, owner, role, plain)
    if negated and phrase.kind in ("indefinite", "quantified"):
        return noun_phrase(draw_noun(dice, classes), "def")
    return phrase


# --------------------------------------------------------------------------------------------------
# Kinds of sentences
# --------------------------------------------------------------------------------------------------
def _may_front(clause):
    """True if the object can stand first and still be told from the subject by its form."""
    if clause.verb.frame not in "AD" or len(clause.objects) != 1 or clause.negated or clause.modal == "gern":
        return False
    thing, subject = clause.objects[0], clause.subject
    if thing.kind in ("pronoun", "name", "none") or clause.aspect:
        return False
    if clause.verb.frame == "D":
        return True
    marked = thing.forms[0] != thing.forms[1]
    return marked or (subject.forms[1] is not None and subject.forms[0] != subject.forms[1] and subject.kind != "name")


def draw_statement(dice):
    """A main clause, sometimes with an adverbial or the object in front."""
    clause = draw_clause(dice)
    if clause.time and not clause.time.mid and dice.chance(0.45):
        return statement(clause, "time")
    if _may_front(clause) and dice.chance(0.25):
        return statement(clause, "object")
    return statement(clause)


def draw_question(dice):
    """A yes/no question."""
    return question(draw_clause(dice, positive=True))


def draw_wh_question(dice):
    """A question with wer, was, wen, wem, wann, warum, wo, wohin, welch- or wie viele."""
    kind = dice.weighted({"who": 3, "object": 3, "when": 2, "why": 2, "where": 2, "which": 3, "how many": 3})
    tenses = {"present": 2, "past": 4, "modal": 2, "future": 1}
    if kind == "who":
        subject = Phrase(("wer",) * 4, "who", "who", "3s", "question", "m")
        return subject_question(draw_clause(dice, subject, "A", tenses, positive=True))
    if kind == "when":
        return wh_question(replace(draw_clause(dice, tenses=tenses, positive=True), time=None), "wann", "when")
    if kind == "why":
        return wh_question(draw_clause(dice, tenses=tenses), "warum", "why")
    if kind == "where":
        if dice.chance(0.5):
            return wh_question(replace(draw_clause(dice, frames="L", tenses=tenses, positive=True), goal=None),
                               "wohin", "where")
        return wh_question(replace(draw_clause(dice, frames="I", tenses=tenses, positive=True), place=None),
                           "wo", "where")
    if kind == "object":
        clause = draw_clause(dice, frames=dice.pick("AD"), tenses=tenses, positive=True)
        words = {"A": ("was", "what"), "D": ("wem", "who")}[clause.verb.frame]
        if clause.verb.frame == "A" and any(c in clause.verb.objects for c in "PA"):
            words = ("wen", "who")
        return wh_question(replace(clause, objects=(), gap=True), *words)
    clause = draw_clause(dice, frames="A", tenses=tenses, positive=True)
    noun = draw_noun(dice, clause.verb.objects)
    if kind == "how many" and not noun.plural:
        kind = "which"
    phrase = noun_phrase(noun, kind, draw_adjective(dice, noun) if dice.chance(0.3) else None,
                         "p" if noun.plural and dice.chance(0.3) else "s")
    # the object must show its case, or the subject must be a pronoun that does
    if phrase.forms[0] == phrase.forms[1]:
        clause = replace(clause, subject=pronoun(dice.pick(("1s", "2s", "3m", "1p"))))
    return wh_question(replace(clause, objects=(), gap=True), phrase.forms[1], phrase.en_object, phrase.parts)


def draw_imperative(dice):
    """A command."""
    plural = dice.chance(0.4)
    frames = dice.weighted({"A": 6, "D": 2, "GO": 3, "+": 3, "L": 2, "I": 2})
    verb = dice.pick([v for v in _VERBS_OF[frames] if not v.stative and v.lemma not in (
        "sich verlaufen", "bekommen", "aufwachen", "weinen", "sich verlieben")])
    clause = draw_clause(dice, pronoun("2p" if plural else "2s"), tenses={"present": 1}, verb=verb)
    clause = replace(clause, time=None)
    return imperative(clause, plural, polite=dice.chance(0.3) and not clause.negated)


def draw_predicate(dice, subject, negated=False, tense=None, noun=None):
    """A clause with sein and an adjective for ``subject``, whose ``noun`` the adjective describes."""
    source = noun or NOUN["Mann"]
    adjective = draw_adjective(dice, source)
    parts = (("adjective", adjective.lemma, noun.head),) if noun else ()
    very = dice.chance(0.3) and adjective.comparative
    goal = Adverbial(("sehr " if very else "") + adjective.lemma, ("very " if very else "") + adjective.en, parts=parts)
    return Clause(subject, VERB["sein"], tense or dice.pick(("present", "present", "past")), goal=goal, negated=negated)


_DESCRIBED = "PARTCVUBXFMDfh"


def draw_description(dice):
    """sein with an adjective or a comparison: Der Hund ist größer als die Katze."""
    noun = draw_noun(dice, _DESCRIBED)
    number = "p" if noun.plural and dice.chance(0.3) else "s"
    subject = noun_phrase(noun, dice.pick(
        ("def", "this") if noun.lemma in ("Mann", "Frau") else ("def", "def", "this", "1s", "1p", "2s")), None, number)
    if not dice.chance(0.4):
        if "P" in noun.classes and dice.chance(0.4):
            return statement(draw_predicate(dice, pronoun(dice.pick(tuple(PRONOUNS))), dice.chance(0.2)))
        clause = draw_predicate(dice, subject, dice.chance(0.2), noun=noun)
        return question(replace(clause, negated=False)) if dice.chance(0.2) else statement(clause)
    adjective = draw_adjective(dice, noun, compared=True)
    letter = next(c for c in noun.classes if c in _DESCRIBED)
    other = draw_noun(dice, letter)
    while other.head == noun.head:
        other = draw_noun(dice, letter)
    other = noun_phrase(other, "def")
    same = dice.chance(0.3)
    parts = (("adjective", adjective.lemma, noun.head),)
    if same:
        goal = Adverbial(f"so {adjective.lemma} wie {other.de('nom')}", f"as {adjective.en} as {other.en}")
    else:
        goal = Adverbial(f"{adjective.comparative} als {other.de('nom')}", f"{adjective.en_comparative} than {other.en}")
    goal = replace(goal, parts=parts + other.parts)
    return statement(Clause(subject, VERB["sein"], dice.pick(("present", "past")), goal=goal,
                            negated=same and dice.chance(0.5)))


def draw_complex(dice):
    """Main clause with weil, obwohl, wenn, bevor, während, dass or ob."""
    conjunction = dice.weighted({"weil": 4, "obwohl": 2, "wenn": 2, "bevor": 1, "während": 1, "dass": 5, "ob": 2})
    tenses = {"present": 4, "past": 5, "modal": 2, "modal past": 1}
    if conjunction in ("bevor", "während"):
        tenses = {"past": 1}
    if conjunction == "wenn":
        tenses = {"present": 3, "modal": 1}
    if conjunction in ("dass", "ob"):
        clause = draw_clause(dice, tenses=tenses)
        if conjunction == "dass":
            verb = dice.pick(_VERBS_OF["C"])
            subject = draw_subject(dice, "P", plain=True)
            tense = "present" if verb.lemma == "hoffen" else dice.pick(("present", "past", "present"))
            main = Clause(subject, verb, tense)
            return complex_sentence(main, "dass", clause)
        subject = draw_subject(dice, "P", plain=True)
        if subject.kind in ("none", "quantified"):
            subject = draw_name(dice)
        return complex_sentence(Clause(subject, VERB["wissen"], negated=True), "ob", clause)
    main = draw_clause(dice, tenses=tenses, plain=True)
    if conjunction in ("bevor", "während"):  # two events, neither of them a state or denied
        clause = draw_clause(dice, tenses=tenses, positive=True)
        while main.verb.stative or main.negated:
            main = draw_clause(dice, tenses=tenses, plain=True)
        while clause.verb.stative:
            clause = draw_clause(dice, tenses=tenses, positive=True)
        return complex_sentence(main, conjunction, replace(clause, time=None))
    if main.subject.owner and dice.chance(0.6):
        subject = pronoun(main.subject.owner)
        if dice.chance(0.4):
            clause = draw_predicate(dice, subject, dice.chance(0.2), "past" if main.tense == "past" else "present")
        else:
            clause = draw_clause(dice, subject, tenses=tenses, frames=dice.pick(("A", "I", "L", "+")))
        return complex_sentence(main, conjunction, clause)
    clause = draw_clause(dice, tenses=tenses)
    return complex_sentence(main, conjunction, clause, first=conjunction in ("wenn", "obwohl") and dice.chance(0.6))


def draw_relative(dice):
    """A noun phrase with a relative clause, as the subject of sein or as an object."""
    number = "p" if dice.chance(0.25) else "s"
    if dice.chance(0.55):
        noun = draw_noun(dice, "P" if dice.chance(0.75) else "A")
        head = noun_phrase(noun, dice.pick(("def", "this")), None, number)
        verb = dice.pick([v for f in "IAL" for v in _VERBS_OF[f] if noun.classes[0] in v.subjects])
        inner = draw_clause(dice, replace(head, kind="relative", parts=()), verb=verb, positive=True,
                            tenses={"present": 3, "past": 4, "modal": 2})
        phrase = relative(head, inner, "nom")
    else:
        verb = dice.pick([v for v in _VERBS_OF["A"] if not any(c in v.objects for c in "PA")])
        noun = draw_noun(dice, verb.objects)
        number = number if noun.plural else "s"
        head = noun_phrase(noun, "def", None, number)
        inner = draw_clause(dice, verb=verb, tenses={"present": 3, "past": 5, "modal": 1}, positive=True)
        phrase = relative(head, replace(inner, objects=(), gap=True), "acc")
    if draw_adjective(dice, noun) and dice.chance(0.6):
        return statement(draw_predicate(dice, phrase, dice.chance(0.15), noun=noun))
    person = any(c in noun.classes for c in "PA")
    verb = VERB[dice.pick(("sehen", "kennen", "suchen") if person else ("brauchen", "suchen", "verlieren"))]
    return statement(Clause(draw_subject(dice, "P", plain=True), verb,
                            dice.pick(("present", "present", "past")), (phrase,)))


def draw_infinitive(dice):
    """versuchen, versprechen ... with zu, or a purpose with um ... zu."""
    if dice.chance(0.55):
        verb = dice.pick(_VERBS_OF["Z"])
        subject = draw_subject(dice, "P", plain=True)
        tense = "present" if verb.lemma == "vorhaben" else dice.pick(("present", "past", "past"))
        main, purpose = Clause(subject, verb, tense), False
    else:
        main = draw_clause(dice, frames="L", tenses={"present": 1, "past": 2}, plain=True, positive=True)
        subject, purpose = main.subject, True
    frames = dice.pick(("A", "A", "D", "GO", "+") if purpose else ("A", "A", "D", "GO", "+", "I"))
    verb = dice.pick([v for v in _VERBS_OF[frames] if not v.stative and "P" in v.subjects
                      and v.lemma not in ("bekommen", "verlieren", "sich verlaufen")])
    clause = draw_clause(dice, subject, verb=verb, tenses={"present": 1}, positive=True)
    return infinitive(main, replace(clause, time=None), purpose)


def draw_counted(dice):
    """Sentences about numbers: prices, ages, dates, inhabitants, and what there is in a place."""
    kind = dice.weighted({"price": 4, "age": 3, "there": 4, "people": 1, "cents": 1, "train": 1, "has": 3, "year": 2})
    n = draw_number(dice, 999)
    de, en = number_words(n)
    parts = (("number", n),)
    if kind in ("price", "cents"):
        noun = draw_noun(dice, "FRTCVU")
        subject = noun_phrase(noun, dice.pick(("def", "this")), draw_adjective(dice, noun) if dice.chance(0.5) else None)
        if kind == "cents":
            euros, cents = 2 + dice.index(40), dice.pick(("20", "50", "90", "99"))
            return finish(f"{subject.de('nom')} kostet {euros},{cents} Euro", f"{subject.en} costs {euros}.{cents} euros",
                          ".", subject.parts)
        if dice.chance(0.4):
            return finish(f"{subject.de('nom')} hat {de} Euro gekostet", f"{subject.en} cost {en} euros", ".",
                          subject.parts + parts)
        return finish(f"{subject.de('nom')} kostet {de} Euro", f"{subject.en} costs {en} euros", ".",
                      subject.parts + parts)
    if kind == "age":
        n = draw_number(dice)
        de, en = number_words(n)
        subject = draw_subject(dice, "P", plain=True)
        if subject.kind not in ("pronoun", "name"):
            noun, owner = draw_noun(dice, "P"), dice.pick(("def", "1s", "2s", "1p", draw_name(dice)))
            subject = noun_phrase(noun, "def" if noun.lemma in ("Mann", "Frau") else owner)
        goal = Adverbial(f"{de} Jahre alt", f"{en} years old", parts=(("number", n),))
        return statement(Clause(subject, VERB["sein"], dice.pick(("present", "past")), goal=goal))
    if kind in ("there", "has"):
        noun = dice.pick(_fitting(NOUN, "g"))
        adjective = draw_adjective(dice, noun) if dice.chance(0.5) else None
        thing = noun_phrase(noun, n, adjective)
        place = draw_place(dice)
        if kind == "has":
            thing = noun_phrase(dice.pick((NOUN["Zimmer"], NOUN["Fenster"], NOUN["Tür"])), n)
            subject = noun_phrase(NOUN[dice.pick(("Hotel", "Haus", "Schloss", "Schule", "Krankenhaus", "Fabrik",
                                                  "Museum", "Theater", "Bibliothek"))], "def")
            return statement(Clause(subject, VERB["haben"], objects=(thing,)))
        where = location(place)
        single = dice.chance(0.3)
        thing = noun_phrase(noun, "a", adjective) if single else thing
        verb_en = "is" if single else "are"
        return finish(f"{where.de} gibt es {thing.de('acc')}", f"there {verb_en} {thing.en_object} {where.en}", ".",
                      thing.parts + where.parts)
    if kind == "people":
        thousands, city = 11 + dice.index(80), dice.pick(("die Stadt=the city", "die Insel=the island"))
        de, en = city.split("=")
        return finish(f"{de} hat {thousands}.000 Einwohner", f"{en} has {thousands},000 inhabitants", ".", ())
    if kind == "train":
        time = f"{6 + dice.index(17)}", dice.pick(("05", "15", "20", "35", "50"))
        de, en = dice.pick(("der Zug=the train", "der Bus=the bus", "das Schiff=the ship")).split("=")
        town = dice.pick(_pairs(TOWNS)[:14])
        return finish(f"{de} nach {town[0]} fährt um {'.'.join(time)} Uhr ab",
                      f"{en} to {town[1]} leaves at {':'.join(time)}", ".", ())
    year = 1901 + dice.index(120)
    return passive(noun_phrase(draw_noun(dice, "b"), "def"), VERB["bauen"],
                   time=Adverbial(f"im Jahr {year}", f"in {year}"))


def draw_passive(dice):
    """Preterite passive with or without its agent."""
    verb = dice.pick([v for v in _VERBS_OF["A"] if not v.en_rest and not v.stative and v.subjects == "P"
                      and v.lemma not in ("treffen", "bekommen", "mitbringen", "haben", "anprobieren")])
    patient = draw_phrase(dice, verb.objects, role="subject")
    if patient.kind in ("none",):
        patient = noun_phrase(draw_noun(dice, verb.objects), "def")
    agent = draw_phrase(dice, "P", role="oblique", plain=True) if dice.chance(0.6) else None
    return passive(patient, verb, agent, draw_time(dice, "past") if dice.chance(0.4) else None)


def draw_swapped(dice):
    """gefallen (the dative becomes the English subject) and gehören."""
    thing = draw_phrase(dice, "RTCVUB", role="oblique")
    person = draw_phrase(dice, "P", role="oblique", plain=True)
    if dice.chance(0.4):
        person = pronoun(dice.pick(tuple(PRONOUNS)))
    elif dice.chance(0.3):
        person = draw_name(dice)
    if thing.kind != "definite":
        thing = noun_phrase(draw_noun(dice, "RTCVUB"), "this")
    single, parts = thing.person == "3s", thing.parts + person.parts
    if dice.chance(0.5):
        return finish(f"{thing.de('nom')} {'gehört' if single else 'gehören'} {person.de('dat')}",
                      f"{thing.en} belong{'s' * single} to {person.en_object}", ".", parts)
    negated = dice.chance(0.25) and person.kind != "quantified"
    verb = "gefällt" if single else "gefallen"
    lexical = Verb("", "", "", "", False, "", "", "", "h", "like", "", "", "liked", "liked", "I", "P", "", True)
    like = english(Clause(person, lexical, negated=negated))
    return finish(f"{thing.de('nom')} {verb} {person.de('dat')}{' nicht' if negated else ''}",
                  f"{like} {thing.en_object}", ".", parts)


def draw_quotation(dice):
    """Direct speech."""
    inner = dice.pick((draw_statement, draw_description, draw_question, draw_imperative))(dice)
    speaker = draw_subject(dice, "P", plain=True)
    if speaker.kind in ("none", "quantified", "indefinite"):
        speaker = draw_name(dice)
    return quotation(inner, speaker)


def draw_coordination(dice):
    """Two main clauses with und, aber or denn."""
    tenses = dice.pick(({"present": 3, "modal": 1}, {"past": 1}))
    first = draw_clause(dice, tenses=tenses, plain=True)
    if first.subject.owner and dice.chance(0.4):
        subject = pronoun(first.subject.owner)
        return coordination(first, dice.pick(("aber", "denn")),
                            draw_clause(dice, subject, dice.pick(("A", "L", "D")), tenses, plain=True))
    return coordination(first, dice.pick(("und", "aber")), draw_clause(dice, tenses=tenses, plain=True))


KINDS = {draw_statement: 30, draw_question: 8, draw_wh_question: 8, draw_imperative: 6, draw_description: 10,
         draw_complex: 14, draw_relative: 7, draw_infinitive: 6, draw_counted: 10, draw_passive: 4, draw_swapped: 4,
         draw_quotation: 4, draw_coordination: 4}


def draw_sentence(dice):
    """One sentence of any kind, as a Sentence."""
    return dice.weighted(KINDS)(dice)


# --------------------------------------------------------------------------------------------------
# The corpus
# --------------------------------------------------------------------------------------------------
def draw_corpus(train=TRAIN, valid=VALID, test=TEST, seed=SEED):
    """The corpus as a dict from split to a list of Sentence.

    Every German sentence occurs once over all splits; no English sentence of test or valid occurs in another
    split. Which part of the grammar each split is drawn from: see ``held_out``. Each split has a stream of
    random numbers of its own and test is drawn first, then valid: test does not depend on the other sizes, and
    a smaller train is the beginning of a larger one. Raises ValueError for a size below 1, for sizes that add
    up to more than MAX_TOTAL or than the grammar yields, and for a negative seed.
    """
    sizes = {"train": train, "valid": valid, "test": test}
    for option, size in sizes.items():
        if size < 1:
            raise ValueError(f"--{option} {size} is too small; valid are whole numbers from 1 to {MAX_TOTAL}")
    if sum(sizes.values()) > MAX_TOTAL:
        total = " + ".join(f"--{option} {size}" for option, size in sizes.items())
        raise ValueError(f"{total} is more than the grammar supplies; valid are sizes that add up to {MAX_TOTAL} at most")
    if seed < 0:
        raise ValueError(f"--seed {seed} is negative; valid are whole numbers from 0")
    corpus, sources, elsewhere = {}, set(), set()
    for stream, split in enumerate(("test", "valid", "train")):
        dice, drawn, misses = Dice(3 * seed + stream), [], 0
        while len(drawn) < sizes[split]:
            sentence = draw_sentence(dice)
            fits = any(map(held_out, sentence.parts)) == (split == "test")
            if fits and sentence.de not in sources and sentence.en not in elsewhere:
                sources.add(sentence.de)
                drawn.append(sentence)
                misses = 0
                continue
            misses += 1
            if misses > MAX_MISSES:
                raise ValueError(f"--{split} {sizes[split]} is more than the grammar supplies with --seed {seed}; "
                                 f"valid are sizes up to {len(drawn)}")
        elsewhere.update(sentence.en for sentence in drawn)
        corpus[split] = drawn
    return {split: corpus[split] for split in SPLITS}


def generate(train=TRAIN, valid=VALID, test=TEST, seed=SEED):
    """The corpus as a dict from split to a list of (German, English) pairs; see ``draw_corpus``."""
    corpus = draw_corpus(train, valid, test, seed)
    return {split: [(sentence.de, sentence.en) for sentence in drawn] for split, drawn in corpus.items()}


def write(outdir, corpus):
    """Write ``corpus`` (from ``generate``) as <split>.de and <split>.en into the new directory ``outdir``.

    The files are written into a temporary sibling that is then renamed, so ``outdir`` is complete or absent.
    Raises FileExistsError if ``outdir`` exists.
    """
    outdir = os.path.abspath(outdir)
    if os.path.lexists(outdir):
        raise FileExistsError(f"OUTDIR {outdir} exists; valid is the path of a directory to be made")
    parent = os.path.dirname(outdir)
    os.makedirs(parent, exist_ok=True)
    work = tempfile.mkdtemp(prefix=f".{os.path.basename(outdir)}.", dir=parent)
    try:
        for split, pairs in corpus.items():
            for i, language in enumerate(("de", "en")):
                path = os.path.join(work, f"{split}.{language}")
                with open(path, "w", encoding="utf-8", newline="\n") as file:
                    file.writelines(pair[i] + "\n" for pair in pairs)
        os.chmod(work, 0o755)
        os.replace(work, outdir)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def main(argv=None):
    """Command line; returns the exit code (2 for a usage error)."""
    parser = argparse.ArgumentParser(
        prog="demo_corpus.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Write a small German-English corpus, made by a grammar: {train,valid,test}.{de,en}, raw UTF-8 "
                    "text, one sentence a line. The same options give the same bytes everywhere. The test "
                    "sentences hold compounds, number words and adjective-noun pairs that training never shows.")
    parser.add_argument("outdir", metavar="OUTDIR", help="directory to make; it must not exist")
    parser.add_argument("--train", type=int, default=TRAIN, metavar="N", help="training pairs")
    parser.add_argument("--valid", type=int, default=VALID, metavar="N", help="validation pairs")
    parser.add_argument("--test", type=int, default=TEST, metavar="N", help="test pairs")
    parser.add_argument("--seed", type=int, default=SEED, metavar="S", help="which sentences are drawn, 0 or more")
    args = parser.parse_args(argv)
    if os.path.lexists(args.outdir):
        parser.error(f"OUTDIR {args.outdir} exists; valid is the path of a directory to be made")
    try:
        corpus = generate(args.train, args.valid, args.test, args.seed)
    except ValueError as error:
        parser.error(str(error))
    try:
        write(args.outdir, corpus)
    except OSError as error:
        print(f"demo_corpus.py: error: cannot write OUTDIR {args.outdir}: {error}", file=sys.stderr)
        return 1
    print(f"{args.outdir}: " + ", ".join(f"{split} {len(pairs)}" for split, pairs in corpus.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
